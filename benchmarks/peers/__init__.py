"""mst beside everything else that lowers the memory of the same work.

    python -m benchmarks.peers                       # everything; resumes where it stopped
    python -m benchmarks.peers --cases mlp --tokens 4096 --redo
    python -m benchmarks.peers --device cuda

Terms
    case        the work: a head and its loss, an MLP, a decoder layer, a whole model (cases.py)
    contender   a way to do it: PyTorch's own, another library's, ours (contenders.py)
    group       a case at one length; all its contenders are compared with each other
    sitting     how a group is measured (__main__.py, turns.py, worker.py)

A sitting
    1. One process makes gradients in float64.
    2. Each contender gets a process with cold compile caches. Gradients of its first step are held
       against those of float64, and the memory of its second step is recorded exactly.
    3. All processes stay, and take steps in turns (A B A B), one at a time, for their times.
A contender whose package is missing, that fails, is killed or takes too long: its row says so.
Packages and how to install them: benchmarks/peers/requirements.txt.
A sitting that was interrupted is held again, without those that failed in it.

Results go to benchmarks/results/peers-<device>.json; docs/peers.md and pictures are made of them
(page.py).
"""
