"""What the reader of a report must know, said on the way too."""

from __future__ import annotations

from dataclasses import dataclass, field

from edgekd.types import Say


@dataclass(frozen=True, slots=True)
class Notes:
    """Texts in the order in which they came, each once."""

    say: Say
    texts: list[str] = field(default_factory=list)

    def add(self, *texts: str) -> None:
        """Keep the new ones of them, and say them."""
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
                self.say("note", text=text)
