import numpy as np
import cuda_kernels as ck
from edgeattn.kernels_cuda import device, steps
cp = device.cupy()
state, scratch = cp.array([1], np.int64), cp.empty(1 << 24, np.uint8)
for n, k in ((4096, 14336), (16384, 2048)):
    w = ck.Weights(n, k, 4)
    x, out = ck.normal(1, k), cp.empty((1, n), np.float32)
    steps.run(w.launches(x, out, state, scratch, 1))
w = ck.Weights(4096, 14336, 4)
for tokens in (16, 64, 512):
    x, out, state = ck.normal(tokens, 14336), cp.empty((tokens, 4096), np.float32), cp.array([tokens], np.int64)
    scratch = cp.empty(1 << 25, np.uint8)
    steps.run(w.launches(x, out, state, scratch, tokens))
cp.cuda.Device().synchronize()
