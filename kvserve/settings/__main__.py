"""`python -m kvserve.settings` prints the table for `docs/configuration.md`."""

from kvserve.settings.table import settings_table

print(settings_table())
