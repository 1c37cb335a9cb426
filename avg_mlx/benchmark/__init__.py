"""The paper's benchmarks: questions and scores by lmms-eval, answers by this package, and the paper's two tables."""
