"""The three kernels round the body of the device-side loop, as CUDA C for NVRTC.

Each is one thread. ``loop_arm`` runs after the loop's inputs have been received and opens it, ``loop_tick`` runs after
each step and decides about the next, ``loop_leave`` runs once at the end and tells the host. ``emulated.loop_work``
says the same in Python, and tests hold the two together.
"""

from __future__ import annotations

from jitgraph.ops import slots as columns

ARM = "loop_arm"
TICK = "loop_tick"
LEAVE = "loop_leave"

# Words of the control block: int64, in pinned host memory that the device sees.
CANCEL = 0
"""Written by the host: not 0 ends a loop after the step in progress, and keeps others from starting."""
LEFT = 8
"""Written by the device at the end of a loop: how many have ended in the upper 32 bits, and in the lower ones the
counter, that is, the number of the next step. One word, so no reader can see half of an ending. It lies on a cache line
of its own, because the host polls it while the device reads ``CANCEL``."""
CONTROL_WORDS = 16

# Words of the loop's own state: int64, on the device.
ENDED = 0
"""Loops that have ended."""
BUDGET = 1
"""Steps that the running loop may still take."""
STATE_WORDS = 2

# cudaGraphSetConditional comes from the driver when the module is loaded; declaring it needs no header.
_BODY = """
typedef unsigned long long graph_condition;
extern "C" __device__ __cudart_builtin__ void cudaGraphSetConditional(graph_condition condition, unsigned int value);

__device__ bool may_go_on(const int* row_slot, const int* slots, int stride, const volatile long long* control)
{
    const long long cancelled = control[CANCEL];  // from host memory each time, and first: it takes the longest
    const int* words = slots + (long long)row_slot[0] * stride;
    return words[FINISHED] == 0 && cancelled == 0;
}

extern "C" __global__ void loop_arm(graph_condition condition, const int* row_slot, const int* slots, int stride,
                                    const volatile long long* control, long long* state, int steps)
{
    state[BUDGET] = steps;
    cudaGraphSetConditional(condition, may_go_on(row_slot, slots, stride, control));
}

extern "C" __global__ void loop_tick(graph_condition condition, const int* row_slot, const int* slots, int stride,
                                     const volatile long long* control, long long* state)
{
    const bool may = may_go_on(row_slot, slots, stride, control);
    const long long budget = state[BUDGET] - 1;
    state[BUDGET] = budget;
    cudaGraphSetConditional(condition, may && budget > 0);
}

extern "C" __global__ void loop_leave(const long long* counter, long long* state, volatile long long* control)
{
    const long long ended = state[ENDED] + 1;
    state[ENDED] = ended;
    __threadfence_system();  // who sees the ending also sees every record that the loop's steps published
    const unsigned long long upper = (unsigned long long)ended << 32;
    control[LEFT] = (long long)(upper | ((unsigned long long)counter[0] & 0xFFFFFFFFull));
}
"""


def loop_source() -> str:
    """The kernels, with the layouts they share with Python spelled out in front."""
    layout = {
        "FINISHED": columns.FINISHED,
        "CANCEL": CANCEL,
        "LEFT": LEFT,
        "ENDED": ENDED,
        "BUDGET": BUDGET,
    }
    return "".join(f"#define {name} {value}\n" for name, value in layout.items()) + _BODY
