//! `cargo xtask bench programs`: real programs of Debian 12, in the same file system everywhere.
//!
//! ```text
//!   mmdebstrap ──> tree/ ──mke2fs──> root.img           once, in the user's cache
//!                   │                   │
//!          chroot in namespaces     /dev/vda, read-only
//!          of its own (native)      (Cordial, QEMU)
//!                   └─────────┬─────────┘
//!              one script: makes its data in a tmpfs, then `bench --command NAME -- ...` for each program
//! ```
//!
//! The native run needs a user who may make namespaces (`unshare`); root may.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::guest::{Machine, Place};
use super::{Kit, Options, PROGRAM, Setup, cpu};
use crate::run;

const ROUNDS: usize = 2;
const SECONDS: f64 = 0.5;
/// Rounds of each program in one run.
const INNER_ROUNDS: usize = 1;
/// A program that takes longer is given up, seconds.
const LIMIT: u32 = 300;
/// The same where a program may run in lockstep.
const ENDLESS_LIMIT: u32 = 3600;
/// The shortest round there is: a program runs once to find out how long it takes, and once more.
pub(super) const LEAST: f64 = 0.001;
/// Guests' memory, MiB.
const MEMORY: u64 = 1024;
/// Where the script lies in a guest's initramfs.
const SCRIPT: &str = "/etc/bench/programs";

/// Debian's packages in the tree, beside the essential ones.
const PACKAGES: &str = "openssl,xz-utils,zstd,gcc,libc6-dev,python3-minimal,perl,sqlite3,redis-server,redis-tools,\
                        sysbench,rt-tests,stress-ng";
/// Changes where the tree must be made anew.
const EDITION: u32 = 1;
/// Bytes of the disk's image; what is not used takes no room.
const DISK: u64 = 2 << 30;

/// A program: its name, whether its output is always the same, and what a shell is to run.
const PROGRAMS: [(&str, bool, &str); 19] = [
    ("sh", true, "i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); done; echo $i"),
    ("openssl-sha256", true, "openssl dgst -sha256 big"),
    ("openssl-aes", true, "openssl enc -aes-128-cbc -K 00112233 -iv 44556677 -in big 2>/dev/null"),
    ("openssl-rsa", true, "openssl dgst -sha256 -sign /usr/share/bench/key.pem text"),
    ("xz", true, "xz -1 -T1 -c small"),
    ("unxz", true, "xz -dc text.xz"),
    ("zstd", true, "zstd -3 -q --single-thread -c text"),
    ("unzstd", true, "zstd -dqc text.zst"),
    ("gcc", true, "gcc -O1 -S -o - source.c"),
    (
        "python",
        true,
        "python3 -S -c 'd = {i: str(i * 7) for i in range(8000)}; print(sum(len(v) for v in d.values()))'",
    ),
    ("perl", true, "perl -e 'local $/; open F, \"text\"; $_ = <F>; $n{lc $_}++ for /\\w+/g; print scalar keys %n'"),
    ("grep", true, "grep -c '[aeiou][a-z]*ing' text"),
    ("sort", true, "sort text"),
    ("sqlite", true, "sqlite3 :memory: < query.sql"),
    ("redis", false, "redis-benchmark -s /tmp/redis.sock -n 500 -c 4 -q -t set,get"),
    ("sysbench-cpu", false, "sysbench cpu --cpu-max-prime=1000 --events=100 --time=0 run"),
    ("hackbench", false, "hackbench -g 1 -f 4 -l 20"),
    ("stress-fork", false, "stress-ng -q --fork 1 --fork-ops 50 --temp-path /tmp"),
    ("stress-matrix", false, "stress-ng -q --matrix 1 --matrix-ops 4 --matrix-size 64 --temp-path /tmp"),
];

/// What they work on, made before the clock runs.
const DATA: &str = r#"
cat /usr/share/perl/5.36.0/*.pm | head -c 1000000 > text
head -c 200000 text > small
cat text text text text > big
xz -1 -c text > text.xz
zstd -q text
cat > query.sql <<'END'
CREATE TABLE t (a INTEGER PRIMARY KEY, b TEXT, c INTEGER);
WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
  INSERT INTO t SELECT i, 'row ' || (i * 7919 % 3001), i % 97 FROM n;
CREATE INDEX x ON t (b);
SELECT c, count(*), max(b) FROM t GROUP BY c ORDER BY 2, 1 LIMIT 5;
SELECT count(*) FROM t JOIN t AS u ON u.b = t.b WHERE t.c < 10;
END
i=0
while [ $i -lt 30 ]; do
  echo "int f$i(int *a, int n) { int s = $i; for (int k = 0; k < n; k++) { if (a[k] % 3 == s) s += a[k] * k; else s ^= k; } return s; }"
  i=$((i + 1))
done > source.c
redis-server --port 0 --unixsocket /tmp/redis.sock --save '' --daemonize yes > /dev/null
"#;

/// Makes the file system of a place ready, as its first process' child; `$1` is the tree, `$2` the script.
const ENTER: &str = r#"
set -e
mount -t tmpfs tmpfs "$1/tmp"
cp "$2" "$1/tmp/script"
cp "$3" "$1/tmp/bench"
chmod 755 "$1/tmp/bench"
exec chroot "$1" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LC_ALL=C /bin/sh /tmp/script
"#;

/// Measures, prints, writes.
pub(super) fn run(options: &Options) -> Result<bool> {
    let root = super::root();
    let names = chosen(options)?;
    let Stage { machine, native, guest } =
        Stage::set(&root, options, &script(&names, options.seconds.unwrap_or(SECONDS)))?;
    let argv = |place: Place| match place {
        Place::Native => native.clone(),
        Place::Cordial | Place::Qemu => guest.clone(),
    };
    cpu::compare(
        &Kit { root, machine, rounds: options.rounds.unwrap_or(ROUNDS), names, schema: "programs" },
        options,
        argv,
    )
}

/// The names of the programs to run.
pub(super) fn chosen(options: &Options) -> Result<Vec<String>> {
    let names: Vec<String> = PROGRAMS.iter().map(|(name, _, _)| (*name).to_owned()).collect();
    cpu::chosen(&names.join("\n"), &options.only)
}

/// Where a script runs.
pub(super) struct Stage {
    pub(super) machine: Machine,
    /// What runs it on the host.
    pub(super) native: Vec<String>,
    /// What runs it in a guest.
    pub(super) guest: Vec<String>,
}

impl Stage {
    /// Builds and makes what a script needs. The next stage takes its script's place.
    pub(super) fn set(root: &Path, options: &Options, script: &str) -> Result<Self> {
        let bench = super::build_workloads(root)?;
        let file_system = FileSystem::find_or_make()?;
        let file = super::folder(root)?.join("programs");
        std::fs::write(&file, script).with_context(|| format!("cannot write {}", file.display()))?;
        let copies: [(&Path, &str); 2] = [(&bench, PROGRAM), (&file, SCRIPT)];
        let setup = Setup { memory: MEMORY, disk: Some(&file_system.image), copies: &copies };
        let machine = super::machine(root, options, &setup)?;
        Ok(Self { machine, native: native(&file_system.tree, &file, &bench), guest: guest() })
    }
}

/// Each program once; the same script in all places.
pub(super) fn script(names: &[String], seconds: f64) -> String {
    format!("cd /tmp\n{DATA}{}", commands(names, seconds, LIMIT).concat())
}

/// The programs in this order, again and again, until so many seconds have passed, and the one that runs then has ended.
pub(super) fn endless(names: &[String], seconds: u64) -> String {
    let again = commands(names, LEAST, ENDLESS_LIMIT).into_iter().map(|command| command + "is_over && exit\n");
    let again: String = again.collect();
    format!(
        "cd /tmp\n{DATA}uptime() {{ read -r up idle < /proc/uptime; echo ${{up%.*}}; }}\nend=$(($(uptime) + {seconds}))\n\
         is_over() {{ [ $(uptime) -ge $end ]; }}\nwhile :; do\n{again}done\n"
    )
}

/// What runs and measures each program.
fn commands(names: &[String], seconds: f64, limit: u32) -> Vec<String> {
    let command = |(name, same, words): &(&str, bool, &str)| {
        let (output, words) = (if *same { "same" } else { "varies" }, words.replace('\'', r"'\''"));
        format!(
            "/tmp/bench --command {name} --output {output} --rounds {INNER_ROUNDS} --seconds {seconds} --limit {limit} \
             -- sh -c '{words}'\n"
        )
    };
    names.iter().filter_map(|name| PROGRAMS.iter().find(|(known, _, _)| known == name)).map(command).collect()
}

fn shell(script: String) -> Vec<String> {
    ["sh", "-c", &script].map(str::to_owned).to_vec()
}

/// The tree in namespaces of its own: its mounts and processes go with it.
fn native(tree: &Path, script: &Path, bench: &Path) -> Vec<String> {
    let unshare = ["unshare", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child"];
    let enter = r#"mount --bind "$1" "$1"; mount -o remount,bind,ro "$1"; mount --rbind /dev "$1/dev"; mount -t proc proc "$1/proc""#.to_owned() + ENTER;
    let mut words: Vec<String> = unshare.map(str::to_owned).to_vec();
    words.extend(shell(enter));
    words.extend(["sh".into(), path(tree), path(script), path(bench)]);
    words
}

/// The disk, in a guest.
fn guest() -> Vec<String> {
    let enter = r#"mount -t ext4 -o ro /dev/vda /mnt; mount -o bind /dev "$1/dev"
                   mount -t tmpfs tmpfs /dev/shm 2>/dev/null || true; mount -o bind /proc "$1/proc""#
        .to_owned()
        + ENTER;
    let mut words = shell(enter);
    words.extend(["sh", "/mnt", SCRIPT, PROGRAM].map(str::to_owned));
    words
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A Debian system, as a folder and as a disk.
struct FileSystem {
    tree: PathBuf,
    image: PathBuf,
}

impl FileSystem {
    fn find_or_make() -> Result<Self> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")));
        let cache = cache.context("no cache folder: set HOME or XDG_CACHE_HOME")?.join("cordial-bench");
        let folder = cache.join(format!("debian-12-{EDITION}"));
        if !folder.exists() {
            let new = cache.join(".new");
            if new.exists() {
                std::fs::remove_dir_all(&new).with_context(|| format!("cannot remove {}", new.display()))?;
            }
            std::fs::create_dir_all(&new).with_context(|| format!("cannot make {}", new.display()))?;
            make(&new)?;
            std::fs::rename(&new, &folder).with_context(|| format!("cannot name {}", folder.display()))?;
        }
        Ok(Self { tree: folder.join("tree"), image: folder.join("root.img") })
    }
}

/// Makes the tree and the image in a new folder: all of it, or an error.
fn make(folder: &Path) -> Result<()> {
    eprintln!("making a Debian 12 system in {} (about 600 MB, once)", folder.display());
    let (archive, tree, image) = (folder.join("tree.tar"), folder.join("tree"), folder.join("root.img"));
    let mut debian = Command::new("mmdebstrap");
    debian.args(["--quiet", "--variant=minbase", &format!("--include={PACKAGES}")]);
    // One key for all places: signatures are then the same.
    let key = r#"mkdir "$1/usr/share/bench"; chroot "$1" openssl genrsa -out /usr/share/bench/key.pem 2048"#;
    debian.arg(format!("--customize-hook={key} 2>/dev/null"));
    // The host's own sources where it is a Debian 12: it reaches them.
    let sources = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"].map(Path::new);
    let is_bookworm = |file: &&&Path| std::fs::read_to_string(file).is_ok_and(|text| text.contains("bookworm"));
    debian.arg("bookworm").arg(&archive).args(sources.iter().find(is_bookworm));
    let made = run::succeeds(&mut debian);
    ensure!(made.context("install it: apt-get install mmdebstrap")?, "{} failed", run::words(&debian));
    std::fs::create_dir(&tree)?;
    step(Command::new("tar").args(["--no-same-owner", "--exclude=./dev/*", "-xf"]).arg(&archive).arg("-C").arg(&tree))?;
    std::fs::remove_file(&archive)?;
    std::fs::File::create(&image)?.set_len(DISK)?;
    step(Command::new("mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&image))
}

fn step(command: &mut Command) -> Result<()> {
    if run::succeeds(command)? {
        return Ok(());
    }
    bail!("{} failed", run::words(command))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_is_one_that_a_shell_accepts() {
        let names: Vec<String> = PROGRAMS.iter().map(|(name, _, _)| (*name).to_owned()).collect();
        let all = script(&names, 0.5);
        assert_eq!(all.matches("/tmp/bench --command").count(), PROGRAMS.len());
        let endless = endless(&names, 60);
        assert_eq!(endless.matches("/tmp/bench --command").count(), endless.matches("is_over && exit").count());
        for text in [all, endless, ENTER.to_owned(), guest()[2].clone()] {
            assert!(Command::new("sh").args(["-n", "-c", &text]).status().unwrap().success(), "{text}");
        }
        assert!(!script(&["xz".into()], 0.5).contains("--command gcc"));
    }
}
