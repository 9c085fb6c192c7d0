"""The plan of a run before any site has measured itself: what can be refused, bounds of bytes."""

from functools import partial
from typing import cast

from fluvial.codecs.quantise import IdentitySettings
from fluvial.errors import ConfigError
from fluvial.exchange import COMPONENTS, NO_TGAP, check_codec, check_unequal
from fluvial.federation.adapters import modules_of
from fluvial.federation.sites import factor_layout
from fluvial.formatting import human_bytes
from fluvial.methods.aggregating import check_aggregation, side_download
from fluvial.methods.fedpipe.config import FedPipeConfig
from fluvial.methods.fedpipe.holding import WIDTHS, smallest
from fluvial.methods.fedpipe.planner.formats import FORMATS, formats_named, layered
from fluvial.methods.fedpipe.planner.memory import base_bytes
from fluvial.methods.fedpipe.planner.sizes import sizes_of
from fluvial.methods.fedpipe.site_configuration import VERSION, format_of, layers_of
from fluvial.methods.idle import idle_bounds, idle_feedback, idle_fraction
from fluvial.methods.interface import Given, Plan
from fluvial.methods.planning import OPTIMIZER_BYTES, uncoded
from fluvial.methods.traffic import Bytes, Traffic, answer, coded_frame, envelope
from fluvial.models.hf import PreTrainedModel
from fluvial.models.quantisation import Format, Quantisation
from fluvial.models.quantised import formats
from fluvial.wire.payload import Value
from fluvial.wire.tensors import Layout, factor


def plan(config: FedPipeConfig, given: Given) -> Plan:
    """Refuse what no plan of a site could use; bound the bytes, since ranks are measured later."""
    check_unequal(given.codec)
    check_aggregation(config.aggregation, given, broadcast=False)
    sent = factor_layout(given.layout, config.factors)
    check_codec(given.codec, NO_TGAP, sent)
    _check_planner(config, given)
    _check_upload(config, given)
    cohort = config.cohort(given.sites)
    steady = cohort == given.sites and given.on_failure == "stop"
    idle = {
        **idle_bounds(cohort),
        **idle_feedback(given, steady=steady),
        **idle_fraction(config, given.sites),
        "train.gradient_checkpointing": "method.planner.checkpointing decides it for each site",
        "train.gradient_accumulation_steps": (
            "the plan of a site has the sequences of a step, one of method.planner.batches"
        ),
    }
    if given.line is None and all(budget.up_mbit_s is None for budget in config.budgets):
        idle["method.least_upload"] = "neither fleet.line nor a budget has a rate up"
    later = {}
    if config.replan_every >= given.rounds:
        later["method.replan_every"] = f"the run has {given.rounds} rounds"

    traffic = partial(_traffic, config, given)
    forecast = partial(uncoded, config, given, traffic, sent, "planned when the run starts")
    return Plan(
        sent,
        forecast,
        notes=[
            "ranks, batches and steps of each site follow from what it measures",
            "the base is not sent: each site loads its own copy, which no byte of a run counts",
        ],
        idle=idle,
        later=later,
    )


def _check_upload(config: FedPipeConfig, given: Given) -> None:
    """Raise `ConfigError` where sites shall send components that the server cannot count."""
    if config.share_of_upload(given.codec) == 1 or config.components_count(given.codec):
        return
    raise ConfigError(
        f"method.least_upload={config.least_upload:g}: a site would send components of its change, "
        "which count under aggregation.mode='svd' with target='changes' or 'stack', and under a "
        "codec without error_feedback and weighted; set it to 1, or change these"
    )


def _check_planner(config: FedPipeConfig, given: Given) -> None:
    """Raise `ConfigError` for choices of the planner that no site can use, for budgets of sites
    that the run does not have, and for a base whose sizes cannot be told."""
    known = set(given.names)
    unknown = [repr(budget.site) for budget in config.budgets if budget.site not in known]
    if known and unknown:
        raise ConfigError(
            f"method.budgets: there is no site {', '.join(unknown)}; the sites are "
            f"{', '.join(map(repr, given.names[:5]))}{', ...' if len(given.names) > 5 else ''}"
        )

    most = max(shape[0] for name, shape in given.layout.shapes if factor(name) == "A")
    ranks = [str(rank) for rank in config.planner.ranks if rank > most]
    if ranks and "ranks" in config.planner.model_fields_set:
        raise ConfigError(
            f"method.planner.ranks: no site can have rank {', '.join(ranks)}, because the server's "
            f"adapter has rank {most}; remove it, or raise lora.r"
        )

    lengths = [str(length) for length in config.planner.lengths if length > given.max_length]
    if lengths:
        raise ConfigError(
            f"method.planner.lengths: no sequence has {', '.join(lengths)} tokens, because "
            f"data.max_length={given.max_length} cuts it; remove it, or raise data.max_length"
        )

    _check_labels(config, given)
    sizes_of(cast(PreTrainedModel, given.base), given.width_bytes)
    if config.planner.formats and given.quantisation.layers:
        raise ConfigError(
            "model.layer_quantization: without effect on plans, because method.planner.formats "
            "names the formats of the base, by layer too; remove one of them"
        )
    for name in config.planner.formats:
        if FORMATS[name].quantised:
            try:
                formats(given.base, Quantisation(cast(Format, name)))
            except ConfigError as error:
                reason = str(error).removeprefix("model.quantization: ")
                raise ConfigError(f"method.planner.formats: {name!r}: {reason}") from error

    assert given.outline is not None
    precision = given.outline.assignment.precision
    if precision not in FORMATS:
        floats = [format.name for format in FORMATS.values() if not format.quantised]
        raise ConfigError(
            f"model.dtype: method 'fedpipe' plans no base in {precision}; set model.dtype to "
            f"{' or '.join(map(repr, floats))}"
        )
    _check_memory(config, given)


def _check_memory(config: FedPipeConfig, given: Given) -> None:
    """Raise `ConfigError` for a budget whose memory is less than the base takes, or than base and
    smallest adapter with its optimizer where the site measures its speed, where such a site would
    stop the run after its baselines have trained."""
    if given.on_failure == "skip":
        return

    assert given.outline is not None
    run = given.outline.assignment
    sizes = sizes_of(given.outline.base, WIDTHS[run.precision], given.correction_rank)
    own = layered(format_of(run), layers_of(run))
    formats = formats_named(config.planner.formats) or (own,)
    base, name = min((base_bytes(sizes, format), format.name) for format in formats)
    adapter = OPTIMIZER_BYTES * smallest(run, config.planner.ranks).layout.numel
    for budget in config.budgets:
        measures = budget.tokens_s is None
        needed = base + (adapter if measures else 0)
        if budget.memory_mb is None or budget.memory_mb * 10**6 >= needed:
            continue

        what = f"the base in format {name} needs {human_bytes(base)}"
        if measures and budget.memory_mb * 10**6 >= base:
            what = (
                f"the base in format {name} and the smallest adapter with its optimizer need "
                f"{human_bytes(needed)} before a pass"
            )
        raise ConfigError(
            f"method.budgets: {what}, more than memory_mb={budget.memory_mb:g} of site "
            f"{budget.site!r}; raise it, add a smaller format to method.planner.formats, or set "
            "fleet.on_failure='skip' to go on without such a site"
        )


def _check_labels(config: FedPipeConfig, given: Given) -> None:
    """Raise `ConfigError` for a length at which a site whose data are here has no label."""
    if given.examples is None or not config.planner.lengths:
        return

    length = min(config.planner.lengths)
    for site, examples in given.examples().items():
        if not any(example.cut(0, length).learns for example in examples):
            raise ConfigError(
                f"method.planner.lengths: no sequence of site {site!r} has a label in its first "
                f"{length} tokens; remove the lengths that end before the answers"
            )


def _traffic(config: FedPipeConfig, given: Given, round: int) -> Traffic:
    """Return bounds of a site's bytes: one module of rank 1, and all at the run's ranks, with the
    side path of the mode."""
    side = side_download(config.aggregation, given)
    layout = given.layout if side is None else side[0]
    down = coded_frame(IdentitySettings(), layout)
    values: dict[str, Value] = {"round": round, VERSION: round}
    if given.downlink is not None:
        values |= {"base": round, "version": round, "sizes": [down.most] * round}
    up = coded_frame(given.codec, factor_layout(given.layout, config.factors))
    error = given.codec.error_feedback
    least = Layout(((given.layout.shapes[0][0], (1, 1)),))
    # Every site makes the first adapter from the seed.
    sends = given.downlink is None and round > 1
    fewest = coded_frame(IdentitySettings(), least).least if sends else 0
    up = Bytes(1, up.most) + answer(error=error, steps=10**6, s="000000.000")
    if config.share_of_upload(given.codec) < 1:
        most: list[Value] = [10**4] * len(modules_of(given.layout.names))
        up += Bytes(0, envelope({COMPONENTS: most}).most)
    return Traffic(
        down=Bytes(fewest, down.most) + envelope({"round": round, VERSION: 1}, values),
        up=up,
    )
