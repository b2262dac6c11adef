//! `--disk`: what a guest writes is there for the host and for the next boot.

use std::path::Path;
use std::process::Command;
use tests::Cordial;

/// An ext4 image.
fn image(directory: &Path) -> String {
    let disk = directory.join("disk.img");
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let disk = disk.to_str().unwrap().to_owned();
    assert!(Command::new("mke2fs").args(["-q", "-t", "ext4", &disk]).status().unwrap().success());
    disk
}

#[test]
fn what_is_written_survives_power_off() {
    let directory = tempfile::tempdir().unwrap();
    let disk = image(directory.path());
    let script = "mount -t ext4 /dev/vda /mnt && echo kept > /mnt/file && cp /bin/busybox /mnt";
    let done = Cordial::run(&["-q", "--disk", &disk, "--", "sh", "-c", script]).done();
    assert_eq!((done.status, done.stderr.as_str()), (0, ""));
    let check = Command::new("e2fsck").args(["-fn", &disk]).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    let script = "mount -t ext4 -o ro /dev/vda /mnt && cat /mnt/file && cmp /bin/busybox /mnt/busybox";
    let done = Cordial::run(&["-q", "--disk", &format!("{disk}:ro"), "--", "sh", "-c", script]).done();
    assert_eq!((done.status, done.text().as_str()), (0, "kept\n"), "{}", done.stderr);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let disk = image(directory.path());
    let before = std::fs::read(&disk).unwrap();
    let script = "cat /sys/block/vda/ro; dd if=/dev/zero of=/dev/vda bs=4096 count=1 2>/dev/null";
    let done = Cordial::run(&["-q", "--disk", &format!("{disk}:ro"), "--", "sh", "-c", script]).done();
    assert_ne!(done.status, 0);
    assert_eq!(done.text(), "1\n");
    assert!(std::fs::read(&disk).unwrap() == before);
}
