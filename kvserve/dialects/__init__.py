"""How models write what is no plain text: reasoning and calls of functions. Pure: text in, parts
out."""
