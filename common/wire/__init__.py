"""The format of what travels between coordinator and hospitals."""
