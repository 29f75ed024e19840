"""GenEval++ and Imagine-Bench: their items, what a judge is asked, how its reply is read, and the arithmetic.

One file is one benchmark. `geneval_pp` and `imagine_bench` have the same functions (`validate_item`, `request`,
`parse`, `group`, `summarize`), so the module itself is the benchmark that `evaluation` is given.

Two protocols, never mixed: `official` asks the judge what the benchmark's authors ask, `strict` asks in words of ours
for a verdict per clause or dimension and reports under a name of its own (`geneval_pp_strict`,
`imagine_bench_strict`).
"""
