"""A memory figure that does not depend on what ran before in the same process."""

import gc

import mlx.core as mx


def settled_memory() -> int:
    """Bytes that MLX's allocator holds for arrays still in reach; the peak is counted from here.

    Without the collection, arrays that an earlier test left in a cycle may be freed at any moment of the measurement,
    and what they held is subtracted from it.
    """
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()
