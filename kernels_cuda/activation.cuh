// Activations of gates, by the numbers of gated_activation's attribute.
#pragma once

__device__ __forceinline__ float activate(float x, int activation)
{
    if (activation == 0) return x / (1.0f + expf(-x));                                                     // silu
    if (activation == 1) return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));  // gelu_tanh
    return fmaxf(x, 0.0f) * fmaxf(x, 0.0f);                                                                // relu2
}
