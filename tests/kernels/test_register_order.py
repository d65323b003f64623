"""The order of an operand in registers: what a thread holds lies side by side in memory, and products do not change."""

import numpy as np
import pytest

from minimax_kernels.register_order import register_order


@pytest.mark.parametrize(("inputs", "stretch"), [(16, 16), (64, 64), (128, 128), (256, 128)])
def test_a_threads_inputs_lie_side_by_side(inputs, stretch):
    memory = np.asarray(register_order(np.arange(inputs)[None], stretch))[0]  # where each input of a product comes from
    for first in range(0, inputs, stretch):
        for thread in range(4):
            # of every 16 inputs, an instruction has two pairs in thread t: 2t, 2t + 1 and 2t + 8, 2t + 9
            own = [first + step + 2 * thread + i for step in range(0, stretch, 16) for i in (0, 1, 8, 9)]
            begin = first + thread * stretch // 4
            np.testing.assert_array_equal(memory[own], np.arange(begin, begin + stretch // 4))


def test_a_product_of_two_in_this_order_is_the_product():
    a, b = (np.random.default_rng(seed).integers(-9, 9, (5, 128)) for seed in (0, 1))
    np.testing.assert_array_equal(register_order(a, 128) @ register_order(b, 128).T, a @ b.T)
