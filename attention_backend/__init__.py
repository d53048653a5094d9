"""PillarAttn: draft and verify attention, scores, selection and the sparse page table."""
