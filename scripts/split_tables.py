"""Tables of split learning, for `write_tables.py`."""

from table_parts import claims, read, table

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
        "clipped; epsilon is that of one hidden state, at delta = 1e-5."
    )
    heading = ["layers before the cut, noise on h_A", *ATTACKS, f"{GRADIENTS} (h_B, g_B)"]

    return "\n\n".join((words, table([heading, *cells]), claims("leakage.json")))
