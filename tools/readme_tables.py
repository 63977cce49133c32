"""Write the tables of README.md and of the docs from what they describe, or check that they are up to date.

    python tools/readme_tables.py            rewrites the tables in place
    python tools/readme_tables.py --check    exits 1 if that would change anything

The settings come from lipsync.config, the calls and fields from the comments of api/optimized_lipsyncsrv.proto, the
metrics from lipsync.transport.metrics.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from google.protobuf import descriptor_pb2

from lipsync.cli.settings import SETTINGS
from lipsync.transport.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
DESCRIPTORS = ROOT / "api" / "optimized_lipsyncsrv" / "descriptors.binpb"


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def settings_table() -> str:
    rows = []
    for setting in SETTINGS.values():
        default = f"`{setting.shown_default}`" if setting.shown_default else ""
        rows.append((f"`{setting.option}`", f"`{setting.variable}`", default, setting.doc))
    return table(("option", "variable", "default", "meaning"), rows)


def described_proto() -> descriptor_pb2.FileDescriptorProto:
    """The contract with its comments."""
    return descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes()).file[0]


def calls_table() -> str:
    proto = described_proto()
    # In a file descriptor, services are field 6, and methods field 2 of a service.
    comments = {tuple(place.path): place.leading_comments for place in proto.source_code_info.location}
    rows = []
    for i, method in enumerate(proto.service[0].method):
        request, answer = (name.rpartition(".")[2] for name in (method.input_type, method.output_type))
        request = f"stream {request}" if method.client_streaming else request
        answer = f"stream {answer}" if method.server_streaming else answer
        doc = re.sub(r"\s+", " ", comments[6, 0, 2, i]).strip()
        rows.append((f"`{method.name}`", f"`{request}` → `{answer}`", doc))
    return table(("call", "messages", "what it does"), rows)


def metrics_table() -> str:
    rows = []
    for metric in Metrics().described:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        rows.append((f"`{metric.name}`", metric.kind, labels, metric.doc))
    return table(("metric", "kind", "labels", "what"), rows)


TABLES = {
    ROOT / "README.md": {"settings": settings_table, "calls": calls_table},
    ROOT / "docs" / "operations.md": {"metrics": metrics_table},
}


def with_tables(path: Path) -> str:
    """A document with its tables as they should be. Raises ValueError if one has no place in it."""
    text = path.read_text("utf-8")
    for name, make in TABLES[path].items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        head, found_start, rest = text.partition(start)
        _, found_end, tail = rest.partition(end)
        if not found_start or not found_end:
            raise ValueError(f"{path.name} has no place for the table of {name} (between {start.strip()} and {end})")
        text = f"{head}{start}{make()}\n{end}{tail}"
    return text


def main() -> int:
    wrong = 0
    for path in TABLES:
        text = with_tables(path)
        if text == path.read_text("utf-8"):
            print(f"{path.name}'s tables are up to date")
        elif "--check" in sys.argv:
            print(f"{path.name}'s tables differ from the code: run `make generate` and commit the result")
            wrong = 1
        else:
            path.write_text(text, "utf-8")
            print(f"wrote {path.name}'s tables")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
