"""Every key of a sweep file as a Markdown table, for sweeps/README.md: what is allowed, the default, what it is."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from models.config import TrialConfig
from orchestrator.sweep.field_docs import field_docs, list_member
from orchestrator.sweep.fields import FILLED_IN_BY_THE_PLAN, KnownField, KnownSection, config_section, section_of
from orchestrator.sweep.schema import GRAMMAR_DOCS, PRESET_DOC
from orchestrator.sweep.settings import Settings

BEGIN, END = "<!-- keys: made by make schema -->", "<!-- end of keys -->"
_HEAD = "| key | allowed | default | what |\n|---|---|---|---|\n"


def key_tables() -> str:
    """Two tables: the keys of the file, and those of ``base``, arms and (dotted) axes. Without installed plug-ins."""
    cells = [f"| `{key}` | | | {said} |" for key, said in GRAMMAR_DOCS.items() if key not in Settings.model_fields]
    of_file = [*cells, *_rows(section_of(Settings), field_docs(Settings), "")]
    docs = {**field_docs(TrialConfig), "model.preset": PRESET_DOC}
    of_config = list(_rows(config_section(), docs, ""))
    return (
        f"Keys of the file (`[]`: of each entry of a list):\n\n{_HEAD}{_lines(of_file)}\n"
        f"Keys of `base` and of an arm; with dots, of axes:\n\n{_HEAD}{_lines(of_config)}"
    )


def with_key_tables(text: str) -> str:
    """A Markdown text with what is between the two marks made anew. ValueError when it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no lines {BEGIN} and {END}, between which the tables go")
    return f"{before}{BEGIN}\n\n{key_tables()}\n{END}{after}"


def _lines(rows: list[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


def _rows(section: KnownSection, docs: dict[str, str], prefix: str) -> Iterator[str]:
    for name, known in section.fields.items():
        path = f"{prefix}{name}"
        said = docs.get(path, "")
        if isinstance(known, KnownField):
            yield _row(path, known, said)
            if (member := list_member(known.annotation)) is not None:
                yield from _member_rows(member, f"{path}[].")
            continue
        if known.of_plugins:
            yield f"| `{path}` | a mapping from plug-ins to their options, or null | | {_cell(said)} |"
            continue
        if said or known.nullable:
            yield f"| `{path}` | a mapping{', or null for none' if known.nullable else ''} | | {_cell(said)} |"
        yield from _rows(known, docs, f"{prefix}{name}.")


def _member_rows(member: type[BaseModel], prefix: str) -> Iterator[str]:
    known = {name: one for name, one in section_of(member).fields.items() if name not in FILLED_IN_BY_THE_PLAN}
    docs = {f"{prefix}{name}": said for name, said in field_docs(member).items()}
    yield from _rows(KnownSection(known), docs, prefix)


def _row(path: str, known: KnownField, said: str) -> str:
    return f"| `{path}` | {_cell(known.allowed)} | {_default(known)} | {_cell(said)} |"


def _default(known: KnownField) -> str:
    if known.default is PydanticUndefined or known.default is None:
        return ""
    value = to_jsonable_python(known.default)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
