"""Tables of the benchmark of FedCyBGD."""

from table_parts import cell, listing, read, table


def block_losses() -> str:
    """FedCyBGD's losses beside full tuning and LoRA."""
    columns = {
        "cell": "cell",
        "contender": "contender",
        "learning_rate": "learning rate",
        "seeds": "seeds",
        "rounds": "passes",
        "loss": "held-out loss",
        "loss_half": "±",
        "ratio": "of fed-full",
        "bytes_up": "up, B a site",
        "bytes_down": "down, B a site",
        "up_share": "up, of fed-full",
        "memory_share": "client memory, of fed-full",
    }
    words = (
        "The same passes for all unless a name says otherwise; every learning rate is the best of "
        "three on seed 0."
    )

    return listing("fedcybgd_losses.json", "losses", columns, words)


def block_downloads() -> str:
    """Forms of download."""
    columns = {
        "cell": "cell",
        "form": "form",
        "down": "down per visit, B",
        "loss": "held-out loss",
        "loss_half": "±",
        "cosine_base": "gradient cosine at the base",
        "cosine_tuned": "after tuning",
        "cosine_tuned_least": "the least",
    }
    return listing(
        "fedcybgd_download.json",
        "download",
        columns,
        "Bytes as sent, one setting and learning rate for all.",
    )


def block_memory() -> str:
    """Client memory, measured and by formula."""
    columns = {
        "case": "tunes, type, rest in",
        "formula_mb": "formula, MB",
        "before_mb": "receiving, MB",
        "train_mb": "training, MB",
        "after_mb": "coding, MB",
        "ratio": "training, of formula",
        "visit_ratio": "whole visit, of formula",
        "share": "of full tuning",
    }
    shapes = {
        "model": "model",
        "form": "form",
        "coded": "upload coded",
        "up_half": "up, half",
        "up_coded": "up, coded",
        "down_half": "down, half",
        "down_fp32": "down, fp32 block",
        "memory": "memory",
        "full_memory": "full tuning",
        "badam": "2M + 16M/D",
    }
    found = read("fedcybgd_memory.json")["rows"]
    lines = [[cell(row.get(key)) for key in shapes] for row in found if row["part"] == "shapes"]
    measured = listing(
        "fedcybgd_memory.json", "memory", columns, "Growth of a client's process in one visit."
    )

    return (
        f"{measured}\n\nBy formula, bytes of one visit and of a "
        f"client:\n\n{table([list(shapes.values()), *lines])}"
    )


def block_compute() -> str:
    """Time per step by block."""
    found = read("fedcybgd_compute.json")["rows"]
    keys = [key for key in found[0] if key != "part"]

    return listing(
        "fedcybgd_compute.json", "compute", {key: key.replace("_", " ") for key in keys}, ""
    )


def block_curves() -> str:
    """Orders of blocks and the paper's own form, from the beginning to the end of a run."""
    columns = {
        "cell": "cell",
        "contender": "contender",
        "steps": "steps of a visit",
        "seeds": "seeds",
        "first": "loss before",
        "loss": "loss at the end",
        "loss_half": "±",
        "bytes_up": "up, B a site",
        "bytes_down": "down, B a site",
    }
    words = (
        "Blocks are layers; uploads of block methods are int8, at the learning rate of "
        "FedCyBGD's in the table of losses. With visits of 150 steps there is one cycle."
    )
    return listing("fedcybgd_paper.json", "paper", columns, words)
