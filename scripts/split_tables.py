"""Tables of split learning, for `write_tables.py`."""

from typing import Any

from table_parts import cell, claim_table, claims, listing, read, table

ATTACKS = ("exact causal search", "nearest token", "trained decoder", "shifted decoder")
GRADIENTS = "gradient matching"


def leakage() -> str:
    """Return the share of tokens that each attack names, by layers before the cut and noise."""
    given = read("leakage.json")
    read_share: dict[tuple[int, str], dict[str, float]] = {}
    for row in given["rows"]:
        case = row["case"]
        if row["part"] == "curve" and "epsilon" in row:
            case = f"{case}, epsilon {row['epsilon']:.0f}"
        if row["part"] == "tuned":
            case = f"no noise, {case}"
        read_share.setdefault((row["cut"], case), {})[row["attack"]] = row["accuracy"]

    cells = [
        [
            f"{cut}: {case}",
            *(
                f"{100 * shares[attack]:.0f} %" if attack in shares else "-"
                for attack in (*ATTACKS, GRADIENTS)
            ),
        ]
        for (cut, case), shares in sorted(read_share.items(), key=lambda item: item[0][0])
    ]
    settings = given["settings"]
    words = (
        f"Tokens named, of {settings['texts']} held-out texts of {settings['tokens']} tokens of "
        "the embedded model and text, one seed. C is the bound to which each hidden state is "
        "clipped; epsilon is that of one hidden state, at delta = 1e-5. A dash: not measured, "
        "because the model has four layers, so that three before the cut and one behind it leave "
        "none to a server, and no gradient is exchanged."
    )
    heading = ["layers before the cut, noise on h_A", *ATTACKS, f"{GRADIENTS} (h_B, g_B)"]

    return "\n\n".join((words, table([heading, *cells]), claims("leakage.json")))


CODEC_TASKS = ("babi", "e2e_nlg", "uci_sentiment")


def activation_codecs() -> str:
    """Return bytes, loss and answers of whole runs by activation codec, for each task."""
    columns = {
        "codec": "codec",
        "bytes_step": "bytes a step and site",
        "share": "of the formula",
        "loss": "held-out loss",
        "deviation": "standard deviation",
        "over_exact": "over exact",
        "accuracy": "next-token accuracy",
        "exact_match": "exact match",
        "f1": "token F1",
        "rouge_l": "ROUGE-L",
        "cloze_accuracy": "cloze accuracy",
        "cloze_probability": "probability of the right answer",
        "cloze_rank": "its mean rank",
    }
    rows = [["task", *columns.values()]]
    held = []

    for task in CODEC_TASKS:
        given = read(f"flglm_codecs_{task}.json")
        rows += [
            [task, *(_codec_cell(key, row.get(key)) for key in columns)] for row in given["rows"]
        ]
        held += [claim | {"name": f"{task}, {claim['name']}"} for claim in given["claims"]]

    return "\n\n".join((table(rows), claim_table(held)))


def _codec_cell(key: str, value: Any) -> str:
    if value is None or key in ("codec", "share", "deviation"):
        return f"{value:.4f}" if isinstance(value, float) else cell(value)
    if key == "over_exact":
        return f"{100 * value:+.2f} %"
    if key == "bytes_step":
        return f"{value:,.0f}"
    if key == "cloze_rank":
        return f"{value:.2f}"
    return f"{value:.4f}" if key == "loss" else f"{100 * value:.1f} %"


def _shares(part: str, attack: str, case: str = "") -> list[float]:
    """Return the shares of tokens that an attack names, over all cuts of a part of the results."""
    shares = [
        row["accuracy"]
        for row in read("leakage.json")["rows"]
        if row["part"] == part and row["attack"] == attack and case in row["case"]
    ]
    assert shares, (part, attack, case)
    return shares


def _percent(shares: list[float]) -> str:
    low = f"{100 * min(shares):.0f}"
    high = f"{100 * max(shares):.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


def leak_plain() -> str:
    """Tokens read from hidden states without noise."""
    exact = _percent(_shares("curve", ATTACKS[0], "no noise"))
    tuned = _percent(_shares("tuned", ATTACKS[0]))
    return (
        f"exact search names {exact} of the tokens at cuts of 1 to 3 layers, {tuned} after 200 "
        "steps of LoRA that the attacker does not know"
    )


def leak_published() -> str:
    """Tokens read under the published noise."""
    return f"exact search names {_percent(_shares('published', ATTACKS[0]))} of the tokens"


def leak_gradients() -> str:
    """Tokens read from gradients, whatever noise is on hidden states."""
    curve = _percent(_shares("curve", GRADIENTS))
    tuned = _percent(_shares("tuned", GRADIENTS))
    return f"{curve} of the tokens at any noise on h_A, {tuned} after 200 steps of LoRA"


def leak_decoders() -> str:
    """Tokens named by the published decoder and by the aligned one."""
    shifted = _percent(_shares("curve", ATTACKS[3], "no noise"))
    aligned = _percent(_shares("curve", ATTACKS[2], "no noise"))
    return f"without noise the shifted decoder names {shifted}, the aligned one {aligned}"


def activations() -> str:
    """Return the error, bytes and time of activation codecs."""
    found = read("activations.json")
    ends = ("h_A", "h_B", "g_A", "g_B")
    errors = [
        [row["codec"], *(cell(float(f"{row[end]:.3g}")) for end in ends)]
        for row in found["rows"]
        if row["part"] == "error"
    ]
    columns = {
        "codec": "codec",
        "rounding": "rounding",
        "bytes_token": "bytes a token",
        "share_16_bit": "of 16 bits a value",
        "encode_mb_s": "encode, MB/s of fp32",
        "decode_mb_s": "decode, MB/s",
        "line_share": "coding, of the line's time",
        "total_share": "coding and line, of 16 bits a value",
    }
    settings = found["settings"]
    words = (
        f"Width 896, fp32, {settings['threads']} thread, seconds of the processor; the line has 1 "
        "Gbit/s."
    )
    return "\n\n".join(
        [
            "Relative error ||decoded - x|| / ||x|| on the embedded model, "
            f"{settings['texts']} public texts of {settings['tokens']} tokens, after the first of "
            f"{settings['epochs']} epochs of training.",
            table([["codec", *ends], *errors]),
            listing("activations.json", "time", columns, words),
        ]
    )


def privacy_utility() -> str:
    """Return the quality of the tuned model beside the tokens that a server reads."""
    given = read("privacy_utility.json")
    settings = given["settings"]
    seeds = len(settings["seeds"])
    tokens = given["rows"][0]["tokens"] // seeds
    cells = [
        [
            f"{row['cut']}: {row['case']}",
            "-" if row["epsilon"] is None else f"{row['epsilon']:.0f}",
            f"{row['base_loss']:.3f}",
            f"{row['loss']:.3f}",
            f"{row['loss_spread']:.3f}",
            f"{100 * row['accuracy']:.1f} %",
            f"{100 * row['hidden']:.0f} %",
            f"{100 * row['gradients']:.0f} %",
        ]
        for row in given["rows"]
    ]
    words = (
        f"Means over {seeds} seeds of whole runs of {settings['rounds']} rounds, client-batch, as "
        "configs/flglm.toml without activation codecs. Loss and accuracy are held-out and, unless "
        'noise is "in use too", of the model without noise. Tokens read are those of the run\'s '
        f"own meter, {tokens} a seed. C is the median norm of a hidden state, {_clips(given)}. The "
        "untuned loss differs from that under Measured, because at most "
        f"{settings['heldout']} held-out sequences of a site are measured here, and 48 there."
    )
    heading = [
        "layers before the cut, noise on h_A",
        "epsilon, one pass",
        "loss, untuned",
        "loss, tuned",
        "max - min",
        "next-token accuracy",
        "read from hidden states",
        "read from gradients",
    ]

    return "\n\n".join((words, table([heading, *cells]), claims("privacy_utility.json")))


def _clips(given: dict[str, Any]) -> str:
    """Return the whole clip at each cut in words."""
    clips = {
        row["cut"]: row["clip"] for row in given["rows"] if row["clip"] and "C =" not in row["case"]
    }
    return ", ".join(f"{clip:g} at p = {cut}" for cut, clip in sorted(clips.items()))


def split_memory() -> str:
    """Return the memory of both ends in training, predicted and measured, and that of tenants."""
    given = read("flglm_memory.json")
    rows = [row for row in given["rows"] if "off" in row]
    cells = [
        [
            row["case"]
            if row["part"] == "memory"
            else f"server, {row['replicas']} tenants, one sequence each",
            *(f"{row[key]:.0f}" for key in ("base_mb", "optimizer_mb", "passes_mb")),
            f"{row['predicted_mb']:.0f}",
            f"{row['measured_mb']:.0f}",
            f"{100 * row['off']:+.0f} %",
        ]
        for row in rows
    ]
    (further,) = (row for row in given["rows"] if row["case"] == "a further tenant")
    words = (
        "A random Llama of 8 layers, width 512, 16,000 tokens of vocabulary, LoRA unless said "
        "otherwise, batches of 4 x 256 tokens; 10^6 bytes. A further tenant was measured at "
        f"{further['measured_mb']:.1f} MB, predicted at {further['predicted_mb']:.1f} MB, beside a "
        f"middle of {further['base_mb']:.0f} MB that all share."
    )
    heading = ["end", "base", "optimizer", "activations, gradients", "predicted", "measured", "off"]
    return "\n\n".join((words, table([heading, *cells]), claims("flglm_memory.json")))


def split_line() -> str:
    """Return the time of rounds over a slow line, predicted and measured."""
    given = read("flglm_slow_line.json")
    (line,) = (row for row in given["rows"] if row["part"] == "line")
    cells = [
        [
            row["case"],
            f"{row['line_s']:.1f} s",
            f"{row['work_s']:.1f} s",
            f"{row['predicted_s']:.1f} s",
            f"{row['measured_s']:.1f} s",
            f"{row['fastest_s']:.1f} to {row['slowest_s']:.1f} s",
            f"{100 * row['off']:+.0f} %",
        ]
        for row in given["rows"]
        if row["part"] == "slow line"
    ]
    settings = given["settings"]
    words = (
        f"Rounds of {settings['steps']} steps of two sites, 8 sequences of 64 tokens each, over "
        f"{settings['mbit_s']:g} Mbit/s and {settings['rtt_ms']:g} ms (tried: {line['rtt_ms']:.0f} "
        f"ms, {line['mbit_s']:.1f} Mbit/s up); the first of {settings['rounds']} rounds does not "
        "count."
    )
    heading = [
        "mode and codec",
        "line and Flower, `check`",
        "work",
        "predicted",
        "measured",
        "least to most",
        "off",
    ]
    return "\n\n".join((words, table([heading, *cells]), claims("flglm_slow_line.json")))


def split_modes() -> str:
    """Return the time of 1,000 sequences by mode and sites, measured and computed."""
    columns = {
        "model": "model",
        "mode": "mode",
        "clients": "sites",
        "seconds": "s for 1,000 sequences",
        "deviation": "standard deviation",
        "over_sequential": "times sequential",
        "server_cpu": "CPU s, server",
        "sites_cpu": "CPU s, all sites",
        "computed": "computed s, a core for each",
        "computed_over_sequential": "times sequential, computed",
    }
    return _figures("flglm_modes.json", columns, "{repeats} repetitions of rounds")


def split_thousand() -> str:
    """Return bytes and time of 1,000 samples, beside what else a user could take."""
    columns = {
        "what": "1,000 samples",
        "bytes": "bytes, both ways",
        "cpu_seconds": "CPU seconds",
        "exchanges_s": "seconds of Flower's exchanges beside",
    }
    return _figures("flglm_thousand.json", columns, "Rounds of {steps} steps at each of four sites")


def split_pipeline() -> str:
    """Return the rate of split steps over the live stream beside that without a network."""
    columns = {
        "model": "model",
        "line": "line",
        "in_flight": "micro-batches in flight",
        "rate": "sequences a second",
        "of_no_network": "of the rate without a network",
        "least": "least",
        "most": "most",
    }
    return _figures("flglm_pipeline.json", columns, "{repeats} repetitions")


def _figures(file: str, columns: dict[str, str], what: str) -> str:
    """Return the rows and claims of a stored report, below what was measured; `what` may name its
    settings in braces."""
    given = read(file)
    lines = [[_short(row.get(key)) for key in columns] for row in given["rows"]]
    words = _loaded(given, what.format_map(given["settings"]))
    return "\n\n".join((words, table([list(columns.values()), *lines]), claims(file)))


def _loaded(given: Any, what: str) -> str:
    """Return what was measured, and the load of the machine meanwhile, in a sentence."""
    machine = given["machine"]
    before, after = (machine[key][0] for key in ("load_before", "load"))
    return (
        f"{what}; {given['settings']['devices']}, one tensor thread each, load average "
        f"{before:.1f} before and {after:.1f} after."
    )


def _short(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else cell(value)
