"""What a GPU would run, on a machine that has none.

PyTorch and Triton take the process to have an H100 (`device`); so each of these is a program that
`test_sm90` starts, and prints what it found as JSON:
    lower     compiles a Llama's step as users do, every Triton kernel down to sm_90's machine code.
    simulate  the memory of the same step, ours and Inductor's.
    graphs    two steps, and whether CUDA graphs could be made of them, loops included.
    offload   a budget that is met only where saved values go to the host.
    longest   Llama-3-8B with 262,144 tokens in 80 GB, by offload; minutes, so no test starts it.
    train     the step of a tiny one, run by Triton's interpreter (`interpreter`), and gradients.

What remains for a real GPU: speed, memory of kernels while they run, what cuBLAS and the attention
kernels compute, races.
"""
