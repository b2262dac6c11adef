//! Where a running machine is found: a directory of its name, whose lock its process holds.

use crate::failure::Failure;
use crate::values::did_you_mean;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Longest name in bytes.
const LONGEST_NAME: usize = 64;
/// Longest path of a Unix socket (unix(7)), its terminating zero left out.
const LONGEST_SOCKET: usize = 107;

/// How often a place is tried for that others keep taking away.
const TRIES: u32 = 100;

const LOCK: &str = "lock";
const SOCKET: &str = "control.sock";

/// The user's directory for what runs.
fn root() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(directory) if Path::new(&directory).is_absolute() => Path::new(&directory).join("cordial"),
        // Shared by all users: whose it is has to be looked at.
        _ => PathBuf::from(format!("/tmp/cordial-{}", user())),
    }
}

fn user() -> u32 {
    rustix::process::getuid().as_raw()
}

/// Checks that a directory is the user's, and nobody else's to enter.
fn check_private(directory: &Path) -> Result<(), String> {
    let about = fs::symlink_metadata(directory).map_err(|error| error.to_string())?;
    if !about.is_dir() || about.uid() != user() || about.mode() & 0o077 != 0 {
        return Err(format!("it must be a directory of user {} with mode 0700", user()));
    }
    Ok(())
}

fn make_private(directory: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

/// Checks that a directory and a command line can bear a name.
///
/// # Errors
/// What a name is.
pub fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = (1..=LONGEST_NAME).contains(&name.len());
    if fits && name.bytes().all(plain) && name.starts_with(|first: char| first.is_ascii_alphanumeric()) {
        return Ok(());
    }
    Err(format!("not 1 to {LONGEST_NAME} letters, digits, dots, dashes and underscores, a letter or digit first"))
}

/// The directory of a machine that this process runs. It goes when this does.
#[derive(Debug)]
pub struct Place {
    directory: PathBuf,
    name: String,
    _lock: File,
}

impl Place {
    /// Takes `name` for a machine of this process.
    ///
    /// # Errors
    /// A name that cannot be, that a running machine has, or whose directory cannot be made.
    pub fn take(name: &str) -> Result<Self, Failure> {
        Self::take_in(&root(), name)
    }

    pub(super) fn take_in(root: &Path, name: &str) -> Result<Self, Failure> {
        check_name(name).map_err(|wanted| Failure::usage(format!("name \"{name}\": {wanted}")))?;
        let directory = root.join(name);
        let shown = directory.display().to_string();
        if directory.as_os_str().len() + 1 + SOCKET.len() > LONGEST_SOCKET {
            let message = format!("{shown} is too long for a socket: take a shorter name, or another XDG_RUNTIME_DIR");
            return Err(Failure::usage(message));
        }
        let failed = |error: &io::Error| Failure::io(format!("make {shown}"), error);
        make_private(root).map_err(|error| failed(&error))?;
        check_private(root).map_err(|why| Failure::other(format!("cannot use {}: {why}", root.display())))?;
        for _ in 0..TRIES {
            make_private(&directory).map_err(|error| failed(&error))?;
            match lock(&directory) {
                Ok(Some(mut lock)) => {
                    let _ = lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()));
                    return Ok(Self { directory, name: name.to_owned(), _lock: lock });
                }
                Ok(None) => {
                    let holder = holder(&directory).map_or_else(String::new, |pid| format!(" (process {pid})"));
                    let message = format!("a machine called {name} runs already{holder}: take another --name");
                    return Err(Failure::usage(message));
                }
                // Somebody took the leftovers away in between.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&error)),
            }
        }
        Err(failed(&io::ErrorKind::NotFound.into()))
    }

    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its control socket is.
    pub(super) fn socket(&self) -> PathBuf {
        self.directory.join(SOCKET)
    }

    /// Makes the socket, at which callers are heard from now on.
    ///
    /// # Errors
    /// The host's.
    pub(super) fn listen(&self) -> Result<UnixListener, Failure> {
        let socket = self.socket();
        let _ = fs::remove_file(&socket); // of a dead process
        UnixListener::bind(&socket).map_err(|error| Failure::io(format!("listen at {}", socket.display()), &error))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        clear(&self.directory);
    }
}

/// Takes a directory away whose lock is held here.
fn clear(directory: &Path) {
    let _ = fs::remove_file(directory.join(SOCKET));
    let _ = fs::remove_file(directory.join(LOCK));
    let _ = fs::remove_dir(directory);
}

/// The lock of a directory; `None` where somebody else holds it.
fn lock(directory: &Path) -> io::Result<Option<File>> {
    let path = directory.join(LOCK);
    loop {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        // The file of this name may be another by now: its last holder took it away.
        match fs::metadata(&path) {
            Ok(about) if about.ino() == file.metadata()?.ino() => return Ok(Some(file)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

/// The process that holds the lock, as it wrote there.
fn holder(directory: &Path) -> Option<u32> {
    fs::read_to_string(directory.join(LOCK)).ok()?.trim_end().parse().ok()
}

/// A machine that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// Its name.
    pub name: String,
    /// Its process, where that is known.
    pub pid: Option<u32>,
    /// Its control socket.
    pub socket: PathBuf,
}

/// Every machine of this user that runs, by name. What dead processes have left behind is taken away.
///
/// # Errors
/// A directory that is somebody else's.
pub fn running() -> Result<Vec<Running>, Failure> {
    running_in(&root())
}

/// The machine of this name, or the only one that runs.
///
/// # Errors
/// There is none, or there are several to choose from.
pub fn find(name: Option<&str>) -> Result<Running, Failure> {
    choose(&running()?, name)
}

fn choose(machines: &[Running], name: Option<&str>) -> Result<Running, Failure> {
    let names = || machines.iter().map(|machine| &machine.name[..]);
    let Some(name) = name else {
        return match machines {
            [] => Err(Failure::no_machine("no machine runs")),
            [only] => Ok(only.clone()),
            _ => {
                let names = names().collect::<Vec<_>>().join(", ");
                Err(Failure::usage(format!("several machines run, name one of them: {names}")))
            }
        };
    };
    machines.iter().find(|machine| machine.name == name).cloned().ok_or_else(|| {
        let near = did_you_mean(name, names());
        let advice = if near.is_empty() { "; `cordial ps` lists those that run" } else { &near };
        Failure::no_machine(format!("no machine called \"{name}\" runs{advice}"))
    })
}

fn running_in(root: &Path) -> Result<Vec<Running>, Failure> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Failure::io(format!("read {}", root.display()), &error)),
    };
    check_private(root).map_err(|why| Failure::other(format!("cannot use {}: {why}", root.display())))?;
    let mut found = Vec::new();
    for entry in entries.filter_map(Result::ok) {
        let Some(name) = entry.file_name().to_str().filter(|name| check_name(name).is_ok()).map(str::to_owned) else {
            continue;
        };
        let directory = entry.path();
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        match lock(&directory) {
            Ok(Some(_lock)) => clear(&directory),
            Ok(None) => found.push(Running { name, pid: holder(&directory), socket: directory.join(SOCKET) }),
            // Gone meanwhile.
            Err(_) => {}
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Kind;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixStream;

    /// A directory as a user's runtime directory is.
    fn private() -> tempfile::TempDir {
        tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir().unwrap()
    }

    #[test]
    fn a_name_is_had_by_one_machine_at_a_time() {
        let root = private();
        let one = Place::take_in(root.path(), "one").unwrap();
        assert_eq!(fs::metadata(&one.directory).unwrap().mode() & 0o777, 0o700);
        let refused = Place::take_in(root.path(), "one").unwrap_err().to_string();
        assert!(refused.contains(&format!("runs already (process {})", std::process::id())), "{refused}");
        let two = Place::take_in(root.path(), "two").unwrap();
        let names = |root: &Path| running_in(root).unwrap().into_iter().map(|one| one.name).collect::<Vec<_>>();
        assert_eq!(names(root.path()), ["one", "two"]);
        drop(one);
        assert_eq!(names(root.path()), ["two"]);
        let again = Place::take_in(root.path(), "one").unwrap();
        drop((two, again));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_dead_processes_leave_is_taken_away_and_nothing_else() {
        let root = private();
        let dead = root.path().join("vm-1");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(LOCK), "1\n").unwrap();
        fs::write(dead.join(SOCKET), "").unwrap();
        fs::create_dir(root.path().join(".hidden")).unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        assert_eq!(running_in(root.path()).unwrap(), []);
        let mut left: Vec<_> = fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".hidden", "file"]);
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join(SOCKET), "").unwrap();
        let place = Place::take_in(root.path(), "vm-1").unwrap();
        let _listener = place.listen().unwrap();
        assert!(UnixStream::connect(place.socket()).is_ok(), "a socket of a dead process is not in the way");
    }

    #[test]
    fn names_and_directories_that_cannot_be_are_refused() {
        let root = private();
        let refused = |name: &str| Place::take_in(root.path(), name).unwrap_err().to_string();
        for bad in ["", ".", "..", "a/b", "-x", "_x", "a b", "ä", &"x".repeat(65)] {
            assert!(refused(bad).starts_with(&format!("name \"{bad}\": not 1 to 64")), "{bad}");
        }
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert!(refused("x").contains("with mode 0700"));
        assert!(running_in(root.path()).unwrap_err().to_string().contains("with mode 0700"));
        assert_eq!(running_in(&root.path().join("none")).unwrap(), []);
        let deep = private();
        let long = deep.path().join("d".repeat(60));
        let refused = Place::take_in(&long, &"x".repeat(64)).unwrap_err().to_string();
        assert!(refused.contains("take a shorter name"), "{refused}");
    }

    #[test]
    fn a_machine_is_chosen_by_its_name_or_by_being_the_only_one() {
        let running = |name: &str| Running { name: name.into(), pid: None, socket: "/x".into() };
        let two = [running("one"), running("two")];
        let refused = |machines: &[Running], name| choose(machines, name).unwrap_err();
        assert_eq!(choose(&two, Some("two")).unwrap(), two[1]);
        assert_eq!(choose(&two[..1], None).unwrap(), two[0]);
        assert_eq!(refused(&two, None).to_string(), "several machines run, name one of them: one, two");
        assert_eq!(refused(&two, Some("tow")).to_string(), "no machine called \"tow\" runs; did you mean \"two\"?");
        assert!(refused(&two, Some("three")).to_string().ends_with("; `cordial ps` lists those that run"));
        for (machines, name, kind) in
            [(&two[..], None, Kind::Usage), (&[], None, Kind::NoMachine), (&two, Some("x"), Kind::NoMachine)]
        {
            assert_eq!(refused(machines, name).kind, kind, "{name:?}");
        }
    }

    #[test]
    fn a_place_that_cannot_be_had_is_given_up() {
        let root = private();
        symlink(root.path().join("nowhere"), root.path().join("link")).unwrap();
        let refused = Place::take_in(root.path(), "link").unwrap_err().to_string();
        assert!(refused.starts_with(&format!("cannot make {}/link: ", root.path().display())), "{refused}");
        // Something that is no socket, and is not taken away, in the socket's place.
        let full = root.path().join("full");
        fs::create_dir_all(full.join(SOCKET)).unwrap();
        let place = Place::take_in(root.path(), "full").unwrap();
        let refused = place.listen().unwrap_err().to_string();
        assert!(refused.contains("cannot listen at ") && refused.contains("/full/control.sock: "), "{refused}");
        drop(place);
        assert!(!full.join(LOCK).exists());
    }
}
