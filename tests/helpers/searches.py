"""Settings of searches that take seconds."""

from qnas.search.config import SearchConfig

# of digits, in a tiny space: the least that learns something
QUICK = SearchConfig(
    preset="test",
    resolution_px=8,
    warmup_epochs=1,
    search_epochs=2,
    batch_size=128,
    learning_rate=5e-3,
    arch_learning_rate=0.1,
    arch_every=2,
)
