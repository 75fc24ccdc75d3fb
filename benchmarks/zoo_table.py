"""docs/results/zoo.md from the records of zoo.py."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

# float64 leaves about 1e-13 after a deep network; a batch norm over two values in train mode magnifies it.
BOUND = {"float64": 1e-9, "float32": 1e-3}

# Sign in the record → why the difference is there.
REASONS = {
    "tensors in train mode and": (
        "It returns auxiliary outputs in train mode; the trace returns those of eval mode in both. The first "
        "output is compared; the auxiliary heads draw random numbers for their dropout first."
    ),
    "decides by the values of a tensor": (
        "Its forward branches on a tensor's values in train mode, which no trace can follow: it behaves "
        "as in eval mode, and says so."
    ),
}


_HEAD = (
    "Made by `python benchmarks/zoo.py` on a 2-core x86 CPU (shared with other work: seconds are upper",
    "bounds), torch 2.13, torchvision 0.28, timm 1.0.31, transformers 5.23, on 2026-11-21. Random",
    "weights, batch of two, inputs as small as the architecture takes them.",
    "",
    "For each model: seconds for trace and search space together; the largest absolute difference",
    "between the outputs of the model and of its trace in eval mode, and in train mode under one seed,",
    "running averages included (0 means bit for bit); the number of structures that may go; and, for",
    "one random valid removal, the largest difference between `space.masked(solution)` and",
    "`espalier.construct(space, solution)` relative to the output's largest entry, without dropout. All",
    "in float64, except models over 90 million parameters (float32, nothing constructed) and those",
    "whose kernels take float32 only.",
    "",
)


def verdict(record: dict[str, Any]) -> str:
    """'' where everything is exact, else what is not."""
    if "failure" in record:
        return record["failure"].splitlines()[0]
    bad = [f"{mode}: {record[mode]:.1e}" for mode in ("eval", "train") if record[mode] != 0.0]
    bound = BOUND[record["dtype"]]
    bad += [
        f"small {mode}: {gap:.1e}" for mode in ("eval", "train") if (gap := record.get(f"small_{mode}", 0.0)) > bound
    ]
    return ", ".join(bad)


def write(path: Path, names: list[str], records: dict[str, dict[str, Any]]) -> None:
    """Write the table; models without a record are listed as not run."""
    rows = [records[name] for name in names if name in records]
    missing = [name for name in names if name not in records]
    bad = [r for r in rows if verdict(r)]
    noted = [r for r in rows if r.get("notes") and not verdict(r)]
    lines = [
        "# The zoo: trace and construct over public models",
        "",
        *_HEAD,
        "| library | models | exact in eval | exact in train | constructed | exact | failed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for library in dict.fromkeys(name.partition("/")[0] for name in names):
        count = _counts([r for r in rows if r["name"].startswith(f"{library}/")])
        columns = ("models", "eval", "train", "constructed", "exact", "failed")
        lines.append(f"| {library} | " + " | ".join(str(count[c]) for c in columns) + " |")
    lines += ["", "## What is not exact, and why", ""]
    lines += [f"- `{r['name']}`: {verdict(r)}. {_reason(r)}".rstrip() for r in bad] or ["Nothing."]
    if noted:
        lines += ["", "## Exact, with a note of the trace", ""]
        lines += [f"- `{r['name']}`: {_words(r)[:400]}" for r in noted]
    if missing:
        lines += ["", "## Not run", "", "Stopped for time; the same command goes on with these:", ""]
        lines += [", ".join(f"`{name}`" for name in missing)]
    lines += [
        "",
        "## All models",
        "",
        "| model | parameters | seconds | eval | train | segments | structures | removed | small, eval "
        "| small, train |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_row(r) for r in rows),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _counts(rows: list[dict[str, Any]]) -> Counter[str]:
    count: Counter[str] = Counter(models=len(rows))
    for record in rows:
        if "failure" in record:
            count["failed"] += 1
            continue
        count["eval"] += record["eval"] == 0.0
        count["train"] += record["train"] == 0.0
        if "removed" in record:
            bound = BOUND[record["dtype"]]
            count["constructed"] += 1
            count["exact"] += max(record["small_eval"], record["small_train"]) <= bound
    return count


def _words(record: dict[str, Any]) -> str:
    """The notes of the trace in one line, files as they are called within their packages."""
    return re.sub(r"/\S*/site-packages/", "", " ".join(" ".join(record.get("notes", ())).split()))


def _reason(record: dict[str, Any]) -> str:
    notes = _words(record)
    reason = next((reason for sign, reason in REASONS.items() if sign in notes), notes[:300])
    if "train_without_dropout" in record:
        reason += f" Without dropout the difference in train mode is {_gap(record['train_without_dropout'])}."
    return reason


def _row(record: dict[str, Any]) -> str:
    cells = [f"`{record['name']}`"]
    if "failure" in record:
        return f"| {cells[0]} | failed: see above " + "| " * 9 + "|"
    cells += [f"{record['params']:,}", f"{record['seconds']}", _gap(record["eval"]), _gap(record["train"])]
    cells += [str(record["segments"]), str(record["structures"]), str(record.get("removed", "-"))]
    cells += [_gap(record[key]) if key in record else "-" for key in ("small_eval", "small_train")]
    return "| " + " | ".join(cells) + " |"


def _gap(value: float) -> str:
    return "0" if value == 0.0 else f"{value:.1e}"
