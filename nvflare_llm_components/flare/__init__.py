"""What every adapter needs of FLARE, one place each. Imports the columns' words, never their mathematics.

Read in this order:

- :mod:`.tasks`      What a task and its context tell the executor
- :mod:`.peers`      Who is on the other side: FLARE's token says it, not what a message says of itself
- :mod:`.messages`   What the precision filters read from FLARE's contexts and messages, and what they leave
                     there
- :mod:`.taken`      Which update of each site the server took: error feedback carries what was left out of
                     the last of them
- :mod:`.results`    What a result and its context tell the persistor
- :mod:`.rounds`     What the server knows of a round: a record for files and monitors, a sentence for people
- :mod:`.quorum`     Whether a round has enough results, and whether it still can have them
- :mod:`.site`       The site that runs this process: its policy, the places that a job may read, and its
                     audit log
- :mod:`.chain`      The filters of a site that a result goes through on its way out
- :mod:`.told`       What is told of an error: to the server never data, to the site's own log all of it
- :mod:`.gate`       The gate on the server: every site's result, of every workflow, before a controller sees
                     it
- :mod:`.arrival`    Tensors on their way to the server from a site that dies: its result is lost, and no
                     job with it
- :mod:`.slices`     Tensors in slices: what a transfer takes of memory is a slice, not the largest tensor
- :mod:`.stores`     Where tensors that arrive in pieces are put together: in memory, or in a file that is
                     mapped
- :mod:`.waiting`    Where results wait for the average: in files of the job's own run directory, by FLARE's
                     disk offload
- :mod:`.headers`    What the adapters tell each other through FLARE's messages: each may run without the
                     others
- :mod:`.pace`       How often a curve's points travel: FLARE sends each as an event of its own, milliseconds
                     of both ends
- :mod:`.memory`     Giving freed memory back to the system, which glibc's allocator would rather keep
"""
