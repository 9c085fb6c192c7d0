"""Tables of method, codec and line that follow from the limits of a run."""

from collections.abc import Sequence

from fluvial.codecs.auto import AutoSettings
from fluvial.codecs.rotated.trellis import MOST_BITS
from fluvial.runs.proposal.document import Section, Setting
from fluvial.runs.proposal.limits import Limit, method_for

DOWN_OVER_UP = 10.0
"""Downlink over uplink of usual lines."""
RTT_MS = 50.0
EPSILON = 8.0
"""The largest epsilon of the paper of CG-FedLLM."""


def method_sections(
    limits: frozenset[Limit],
    sites: Sequence[str],
    *,
    rate: float,
    update_bytes: int,
    uplink_mbps: float | None,
    public: bool,
    clip_norm: float,
) -> list[Section]:
    """Return the tables below `[train]`.

    `rate` is the times an update of `update_bytes` is sent smaller, `clip_norm` an estimate of its
    norm, and `public` says whether there is public text.
    """
    slow = "slow-links" in limits
    line = [_line(uplink_mbps)] if uplink_mbps is not None else []
    match method_for(limits):
        case "flglm":
            return [*_split(slow), *line]
        case "fedpipe":
            return [*_unequal(sites, slow), *line]
        case "cgfedllm" if "privacy" in limits:
            return [*_private(slow, rate, clip_norm), *line]
        case "cgfedllm":
            return [*_slow(rate, update_bytes, uplink_mbps, public), *line]

    remark = (
        'updates are sent exactly. For slow lines: name = "cgfedllm" and a [codec] table; see '
        "`fluvial recipes`"
    )
    return [Section("", [], remarks=[remark]), *line]


def _slow(rate: float, update_bytes: int, uplink_mbps: float | None, public: bool) -> list[Section]:
    least = round(32 / MOST_BITS, 1)
    rate = max(rate, least)
    target = f"an update has 1/{rate:g} of the bytes of fp32, {32 / rate:.2g} bits a value"
    if uplink_mbps is None:
        target += (
            ": assumed, since no uplink is known; `fluvial init --uplink 2` sets it for 2 Mbit/s, "
            "a smaller number loses less"
        )
    else:
        upload_s = 8 * update_bytes / rate / (1e6 * uplink_mbps)
        target += f": {upload_s:.2g} s at {uplink_mbps:g} Mbit/s; {_aim(rate, least, upload_s)}"
    method = Setting("name", "cgfedllm", "FedAvg over LoRA with coded updates")
    down = Section(
        "[downlink]",
        [Setting("name", "trellis"), Setting("rate", 16)],
        why="the adapter goes down as a coded difference to what a site holds",
    )
    if public:
        return [
            Section("[method]", [method, Setting("tgap", {"source": "public"})]),
            Section(
                "[codec]",
                [
                    Setting("name", "auto", "measures candidates on the public text"),
                    Setting("rate", rate, target),
                ],
            ),
            down,
        ]

    nothing = "the codec learns nothing, so no update is needed before round 1"
    return [
        Section("[method]", [method, Setting("tgap", {"source": "none"}, nothing)]),
        Section(
            "[codec]",
            [
                Setting("name", "trellis", _why_trellis(rate)),
                Setting("rate", rate, target),
                Setting("error_feedback", True, "sites keep what was lost and send it later"),
            ],
        ),
        down,
    ]


def _aim(rate: float, least: float, upload_s: float) -> str:
    """Return why an upload of `upload_s` is the aim, for a rate that is at least `least`."""
    allowed = AutoSettings().upload_s
    if rate == least:
        return (
            f"an upload may take {allowed:g} s, and trellis never uses more bits; a larger rate is "
            "quicker and loses more"
        )
    if upload_s > 1.1 * allowed:
        return f"an upload should take {allowed:g} s, but a larger rate would lose too much"
    return f"an upload may take {allowed:g} s, as `auto` has it by default"


def _why_trellis(rate: float) -> str:
    if 32 / rate < 1:
        return "needs the fewest bytes of the codecs that learn nothing"
    return "sign and int4 end alike at one bit a value or more, but have no rate to set"


def _private(slow: bool, rate: float, clip_norm: float) -> list[Section]:
    method = Section(
        "[method]",
        [
            Setting("name", "cgfedllm", "the method with differential privacy at the site"),
            Setting("tgap", {"source": "none"}, "no update leaves a site beside the private ones"),
        ],
    )
    privacy = Section(
        "[method.privacy]",
        [
            Setting(
                "placement", "update", "the site clips and adds noise: the server needs no trust"
            ),
            Setting("clip_norm", clip_norm, "an estimate of an update's norm; measure it without"),
            Setting("epsilon", EPSILON, "of the whole run; smaller is more private, and noisier"),
        ],
        remarks=[
            "With few sites the noise may be larger than what is learned: compare the loss of the "
            "base with that of the result.",
        ],
    )
    codec = Section(
        "[codec]",
        [
            Setting("name", "eden", "no bias, and no memory of what was lost, which noise forbids"),
            Setting("rate", rate, f"an update has 1/{rate:g} of the bytes of fp32"),
        ],
    )
    exact = Section("[codec]", [Setting("name", "identity", "nothing is lost beside the noise")])
    return [method, privacy, codec if slow else exact]


def _split(slow: bool) -> list[Section]:
    method = Section(
        "[method]",
        [
            Setting("name", "flglm", "split learning: the middle layers stay at the server"),
            Setting("front", 1, "decoder layers at a site, with the embedding"),
            Setting("back", 1, "and with norm and head"),
        ],
        remarks=[
            "Hidden states leave the sites, and the server can read text from them: "
            "docs/methods/flglm.md",
        ],
    )
    coded = [
        Section(
            f"[method.{name}]",
            [Setting("name", "int8", "8 bits a value; it crosses the line in each step")],
        )
        for name in ("hidden", "gradient")
    ]
    return [method, *(coded if slow else [])]


def _unequal(sites: Sequence[str], slow: bool) -> list[Section]:
    example = sites[0] if sites else "north"
    method = Section(
        "[method]",
        [Setting("name", "fedpipe", "each site gets the weights, ranks and batch that fit it")],
        remarks=[
            "What a site has is measured when the run starts. To set it, add for each site:",
            f'[[method.budgets]] with site = "{example}", memory_mb = 8_000, up_mbit_s = 5.0, '
            "down_mbit_s = 50.0",
            "`fluvial plan` shows the plan of each site.",
        ],
    )
    codec = Section("[codec]", [Setting("name", "int8", "a quarter of the bytes, hardly any loss")])
    return [method, *([codec] if slow else [])]


def _line(uplink_mbps: float) -> Section:
    return Section(
        "[fleet.line]",
        [
            Setting("up_mbit_s", uplink_mbps, "yours"),
            Setting("down_mbit_s", DOWN_OVER_UP * uplink_mbps, "a guess: ten times the uplink"),
            Setting("rtt_ms", RTT_MS, "a guess"),
        ],
        why="`fluvial check` predicts a round over this line, and `auto` weighs bytes by it",
    )
