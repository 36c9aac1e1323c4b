"""Settings: the command line over the environment over a TOML file over the defaults.

In the file, a chosen `[profiles.NAME]` table stands over the top level.
"""

from kvserve.settings.fields import Settings
from kvserve.settings.load import environment_warnings, flag_name, load_settings
from kvserve.settings.values import Percent

__all__ = ["Percent", "Settings", "environment_warnings", "flag_name", "load_settings"]
