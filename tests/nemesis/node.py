"""`flower-supernode` of a hospital whose clock is wrong by `FEDSGCG_NEMESIS_SKEW_S` seconds.

Only the time that Flower signs is shifted, in this process.
"""

import datetime
import os
import sys

from flwr.supercore import date
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.cli import flower_supernode

SKEW = datetime.timedelta(seconds=float(os.environ["FEDSGCG_NEMESIS_SKEW_S"]))


def skewed() -> datetime.datetime:
    """Time of a wrong clock."""
    return date.now() + SKEW


def main() -> None:
    """Run the SuperNode."""
    sys.argv[0] = "flower-supernode"
    node_auth_http_interceptor.now = skewed
    flower_supernode()
