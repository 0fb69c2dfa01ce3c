"""What the next forward call computes: a token of each answer, and a piece of the prompts that are being read, in turn."""

CHUNK = 128  # prompt tokens beside decode steps: a new prompt delays the others' next tokens by no more


def next_call(running: list, ubatch: int, most_rows: int) -> tuple[list, str]:
    """-> ([(run, token ids)], which rows of logits). A prompt whose tokens are scored needs all its rows, at most `most_rows`, and so
    reads alone beside the decoding ones."""
    work = [(run, run.tokens[-1:]) for run in running if run.pending == 1 and not run.scoring]
    left = min(CHUNK, ubatch) if work else ubatch
    for run in sorted((run for run in running if run.pending > 1 or run.scoring), key=lambda run: run.turn):
        if run.scoring and any(len(ids) > 1 for _, ids in work):
            continue
        room = max(1, min(left, most_rows - len(work))) if run.scoring else left
        start = run.sequence.length
        work.append((run, run.tokens[start:start + room]))
        left -= len(work[-1][1])
        if run.scoring or left <= 0:
            break
    return work, "all" if work[-1][0].scoring else "last"
