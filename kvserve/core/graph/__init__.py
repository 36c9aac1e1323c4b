"""llama.cpp's worst-case compute graph for a launch, and the memory that ggml needs for it."""
