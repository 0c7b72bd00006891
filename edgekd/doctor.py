"""`edgekd doctor`: what this machine has, and what each target can do here."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd import plugins
from edgekd import target as target_files
from edgekd.bench.conditions import environment, without_vnni
from edgekd.types import Backend, Json


@dataclass(frozen=True, slots=True)
class Examination:
    """Facts about the machine, and for each target None where it can build and run here, else why not."""

    environment: dict[str, Json]
    targets: dict[str, str | None]
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Json]:
        """The same facts as one JSON object."""
        return {"environment": self.environment, "targets": dict(self.targets), "warnings": [*self.warnings]}

    def as_text(self) -> str:
        """The same facts as lines to read."""
        lines = [*_lines(self.environment), "targets"]
        for name, reason in self.targets.items():
            state = (
                "builds and runs here" if reason is None else f"exports only; nothing is built or timed here: {reason}"
            )
            lines.append(f"  {name}: {state}")
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def examine() -> Examination:
    """Look at this machine; nothing is installed, written or sent."""
    targets: dict[str, str | None] = {}
    for name in target_files.names():
        target = target_files.load(name)
        backend: Backend = plugins.build("backends", target.backend, where=f"targets/{name}.toml: backend")
        targets[name] = backend.available()
    facts = environment()
    slow = without_vnni(facts)
    return Examination(facts, targets, (slow,) if slow else ())


def _lines(facts: Json, indent: str = "") -> list[str]:
    if not isinstance(facts, dict):
        return [f"{indent}{facts}"]
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict) and not value:
            continue
        if isinstance(value, dict):
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{indent}{key}: {'not known' if shown is None else shown}")
    return lines
