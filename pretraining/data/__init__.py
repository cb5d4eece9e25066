"""From documents to rows of token ids, and from rows to micro-batches."""
