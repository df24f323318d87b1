"""How many tokens a pass may hold on the device at hand: one small pass is measured, the rest is in proportion."""

from collections.abc import Callable

import torch

ON_CPU = 1536  # more tokens at once gain nothing on a few cores
MOST = 16_384  # on a card, too: on an H200 a 7B model trained no faster with three times as many (benchmarks/results)
FILLED = 0.8  # share of what is free that a pass may take: batches differ, and the allocator cannot use every gap


def tokens_that_fit(one_pass: Callable[[], object], tokens: int, device: torch.device) -> int:
    """Measure a pass and tell how many tokens another may hold.

    Args:
        one_pass: a forward and a backward pass after which nothing new is held but what stays for good, such as
            gradients. It is run twice on a GPU and not at all elsewhere.
        tokens: padded ones that it computes.
        device: where it runs.

    Returns:
        `ON_CPU` off the GPU; there as many as fit into what is free, at most `MOST`, but never fewer than `tokens`.
    """
    if device.type != "cuda":
        return ON_CPU
    with torch.random.fork_rng([device]):  # what is drawn later is what would have been drawn without this
        one_pass()  # the first one allocates what stays: gradients, and the libraries' own buffers
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        one_pass()
    taken = torch.cuda.max_memory_allocated(device) - held
    torch.cuda.empty_cache()
    return max(tokens, min(MOST, int(FILLED * free_bytes(device) / taken * tokens)))


def free_bytes(device: torch.device) -> int:
    """Bytes of a GPU that this process may still fill, its own unused reserve among them.

    A limit set by `torch.cuda.set_per_process_memory_fraction` counts.
    """
    held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free, all_of_it = torch.cuda.mem_get_info(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * all_of_it
    return int(min(free + reserved, allowed) - held)
