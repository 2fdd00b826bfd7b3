"""The format of the messages between coordinator and hospitals."""
