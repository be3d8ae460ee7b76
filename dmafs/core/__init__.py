"""The core: extents, journals, mirror, maps and syncs; synchronous, all I/O through ``storage``.

What dmafs promises, cited elsewhere as "promise n":

1. *No acknowledged write is lost silently.* What the primary's user has flushed is durable in the forward journal, or
   the volume records a gap that says since when.
2. *An image is exactly a prefix of history*: the initial copy and the events up to its seq, bit for bit, at any moment.
3. *A sync is one transaction*: backward data and descriptors durable, then the commit record, then the mirror
   overwritten, then the forward tail advanced. Cut anywhere, it is done again or forgotten.
4. *An open image never changes*, whatever is synced, dropped or removed meanwhile.
5. *Damage is never served*: descriptors and extents have checksums; what doesn't match is an error that names it.
6. *The primary waits for the appliance* only as long as appending to the journal takes.
7. *Everything is bounded*: queues, caches, batches and segments have limits with names.
8. *The core knows neither trio nor FUSE.*
9. *Derived data can be rebuilt*: any map can be thrown away and made again from descriptors, equal.

Figures and tables are cited by the numbers they have in the original description of the data management appliance,
whose terms are used throughout: mirror in the middle, forward and backward journal, virtual recovery mapping object.
"""
