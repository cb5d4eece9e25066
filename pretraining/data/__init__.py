"""From token ids to rows, and from rows to micro-batches."""
