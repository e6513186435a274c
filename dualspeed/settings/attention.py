"""Implementations of the language model's attention, by transformers' names."""

from dualspeed.errors import ConfigError

SDPA, EAGER, FLEX = "sdpa", "eager", "flex_attention"
ATTENTION = (SDPA, EAGER, "flash_attention_2", "flash_attention_3", FLEX)


def reads_lengths(implementation: str | None) -> bool:
    """True for attention that takes rows of several lengths behind one another, at no cost for pairs of two rows.

    Flash attention has many names, those of kernels of the Hub among them.
    """
    return implementation is not None and (implementation == FLEX or "flash" in implementation)


def check_reads_lengths(implementation: str | None) -> None:
    """Raise ConfigError for packing with attention that doesn't read lengths; None: transformers' choice, SDPA."""
    if not reads_lengths(implementation):
        raise ConfigError(
            f"packing: the language model's attention is {implementation or SDPA!r}, which reads no cumulative "
            "lengths: a mask makes it dense over the whole row, 15-99 % slower on a CPU; valid: attn_implementation "
            f"{' or '.join(filter(reads_lengths, ATTENTION))}"
        )
