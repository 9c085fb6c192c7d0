"""Both directions between server and sites, for every method that shares an adapter.

At the server a method iterates over `Exchange.updates`; at a site it writes a function that trains,
which `shared` makes a task of. It sees no payload, frame or codec.
"""

from fluvial.exchange.at_site import LocalUpdate, encode, receive_exchange, shared, shared_tasks
from fluvial.exchange.checks import check_codec, check_fixed_rate, check_refit, check_unequal
from fluvial.exchange.exchange import Exchange, Update
from fluvial.exchange.gathering import (
    STALE,
    Gathering,
    Readable,
    ask_stale_again,
    is_stale,
    to_all,
)
from fluvial.exchange.rule import COMPONENTS, EVERY_REPLY, Further, Handout, Rule
from fluvial.exchange.terms import Terms
from fluvial.exchange.tgap import NO_TGAP, PUBLIC_TGAP, TgapConfig
from fluvial.exchange.uplink import coder_of, reports_error

__all__ = [
    "COMPONENTS",
    "EVERY_REPLY",
    "NO_TGAP",
    "PUBLIC_TGAP",
    "STALE",
    "Exchange",
    "Further",
    "Gathering",
    "Handout",
    "LocalUpdate",
    "Readable",
    "Rule",
    "Terms",
    "TgapConfig",
    "Update",
    "ask_stale_again",
    "check_codec",
    "check_fixed_rate",
    "check_refit",
    "check_unequal",
    "coder_of",
    "encode",
    "is_stale",
    "receive_exchange",
    "reports_error",
    "shared",
    "shared_tasks",
    "to_all",
]
