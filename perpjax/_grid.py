"""The decision grid."""

BAR_MS = 900_000
"""Length of a decision bar, milliseconds."""
FIRST_DECISION = 673
"""The first bar with complete core features: vol_672 needs 673 closes."""
MAX_CANDLES = 15
"""Candles of a bar, at most: those of a minute."""
