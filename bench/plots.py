"""The picture of a CPU results file: training speed against model size below its roof, and every op's share of its own roof.

Drawn by `python -m bench.readme`. The picture carries the SHA-256 of the results it shows, so that a stale one is noticed.
"""

from pathlib import Path
from typing import Any

PROVIDERS = {
    "csrc": "HyperLlama",
    "transformers compiled": "transformers + torch.compile",
    "transformers": "transformers",
}
COLOURS = {"csrc": "#c0392b", "transformers compiled": "#2c7fb8", "transformers": "#7fb2d4"}
KEY = "Results"  # of the PNG's text


def rates(results: list[dict[str, Any]], provider: str) -> list[tuple[float, float]]:
    """(FLOPs a token, FLOP/s) of the bf16 steps, smallest model first; the products' rate is the provider `matmul`."""
    points = []
    for result in results:
        found = result["providers"].get(provider)
        if result["case"] == "step" and result["params"]["dtype"] == "bfloat16" and found and found["seconds"]:
            points.append((result["flops"] / result["params"]["tokens"], result["flops"] / found["seconds"]["median"]))
    return sorted(points)


def shares(results: list[dict[str, Any]]) -> list[tuple[str, float, float | None]]:
    """(op, share of its roof, target) of the bf16 ops whose roof is a copy or bare products."""
    return [
        (result["case"], target["measured"]["median"], target["least"])
        for result in results
        for target in result["targets"]
        if target["against"] in ("copy", "gemms") and target["measured"] and result["params"]["dtype"] == "bfloat16"
    ]


def draw(document: dict[str, Any], digest: str, path: Path) -> None:
    """Write the PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    results = document["results"]
    roof = rates(results, "matmul")
    left.plot([x for x, _ in roof], [y / 1e9 for _, y in roof], "k--", linewidth=1, label="the matrix products alone")
    for provider, label in PROVIDERS.items():
        points = rates(results, provider)
        left.plot([x for x, _ in points], [y / 1e9 for _, y in points], "o-", color=COLOURS[provider], label=label)
    left.set(xscale="log", ylim=(0, None), title="training steps, bf16")
    left.set(xlabel="model size in training FLOPs a token", ylabel="GFLOP/s")
    left.legend(fontsize=8, loc="lower right")
    ops = shares(results)[::-1]
    right.barh([name for name, *_ in ops], [share for _, share, _ in ops], color=COLOURS["csrc"])
    for i, (_, _, least) in enumerate(ops):
        if least is not None:
            right.plot([least, least], [i - 0.4, i + 0.4], "k", linewidth=1.5)
    right.axvline(1, color="k", linestyle="--", linewidth=1)
    right.set(xlabel="share of its roof (black: target)", title="C++ ops, bf16")
    right.tick_params(axis="y", labelsize=7)
    about = document["environment"]
    figure.suptitle(f"{about['device']}, {about['threads']} threads, {document['date']}", fontsize=9)
    figure.savefig(path, dpi=90, metadata={KEY: digest, "Software": None})
    pyplot.close(figure)


def shown(path: Path) -> str | None:
    """The digest of the results that a picture shows."""
    from PIL import Image

    with Image.open(path) as image:
        found = image.info.get(KEY)
    return str(found) if found else None
