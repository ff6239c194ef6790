// As lkda/ops/include/named_barrier.cuh, for a host compiler.
#pragma once

void wait_at_barrier(int number, int threads);
