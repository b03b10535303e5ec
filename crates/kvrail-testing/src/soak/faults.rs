//! What the mount does wrong, one thing at a time.

/// A script for the mount, and what follows from it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Script {
    /// The rules.
    pub(super) rules: &'static str,
    /// Whether bytes change on the way to the disk.
    pub(super) damages: bool,
    /// Whether calls hang: such a script stays in force for longer.
    pub(super) hangs: bool,
    /// Whether files that are there are said to be missing: whoever counts counts too few.
    pub(super) hides: bool,
}

const fn script(rules: &'static str) -> Script {
    Script {
        rules,
        damages: false,
        hangs: false,
        hides: false,
    }
}

/// All of them.
pub(super) const SCRIPTS: [Script; 19] = [
    script("read,open,lookup *-* error=EIO probability=0.05"),
    script("write,create,rename *-* error=EIO probability=0.2"),
    script("write,create,mkdir *-* error=ENOSPC probability=0.5"),
    script("write *-* error=EDQUOT probability=0.5"),
    script("lookup,getattr,open,read *-* error=ESTALE probability=0.1"),
    script("open,create *-* error=EACCES probability=0.1"),
    script("create,write,rename,unlink,mkdir *-* error=EROFS"),
    script("unlink,rmdir * error=EIO probability=0.5"),
    script("rename,unlink *-* done=EIO probability=0.3"),
    // Lease and accounts.
    script("* .kvrail* error=EIO probability=0.2"),
    Script {
        hides: true,
        ..script("lookup,open *.safetensors error=ENOENT probability=0.2")
    },
    script("read,write *-* error=EINTR probability=0.2"),
    script("read,write *-* short probability=0.5"),
    script("read *.safetensors flip probability=0.3\nread *.safetensors zero probability=0.2"),
    Script {
        damages: true,
        ..script("write *.chunk.* flip probability=0.3\nwrite *.chunk.* swap probability=0.2")
    },
    script("* *-* delay=3ms probability=0.3"),
    Script {
        hangs: true,
        ..script("read,write *-* hang probability=0.1")
    },
    Script {
        hangs: true,
        ..script("* * hang probability=0.02")
    },
    Script {
        hides: true,
        ..script("lookup *.safetensors late=300ms\nlookup,getattr *-* skew=3600s probability=0.5")
    },
];
