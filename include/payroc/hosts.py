"""Where Payroc is: API and identity base URLs (https://docs.payroc.com/api/authentication)."""

from __future__ import annotations

HOSTS = {
    "uat": ("https://api.uat.payroc.com/v1", "https://identity.uat.payroc.com"),
    "production": ("https://api.payroc.com/v1", "https://identity.payroc.com"),
}
"""API and identity base URLs by environment."""

PRODUCTION = HOSTS["production"][0]
"""API base URL of the environment that moves money."""
