//! The native dialect for the user space of a stock Linux guest, over the contract device.

use serde_json::{Value, json};
use tests::{Cordial, Guest, User};

const DIALECTS: [&str; 4] = ["--name", "vm", "--dialect", "kvm,cordial"];

/// What a command in the guest prints as JSON.
#[track_caller]
fn inside(guest: &mut Guest, command: &str) -> Value {
    guest.say(&format!("{command} --json"));
    serde_json::from_str(&guest.wait_for("{")).unwrap()
}

/// The status of a command in the guest.
#[track_caller]
fn status(guest: &mut Guest, command: &str) -> String {
    guest.say(&format!("{command} > /dev/null 2>&1; echo status $?"));
    guest.wait_for("status ")
}

/// Names of native features that `contract show` has `what` set for.
fn shown(user: &User, what: &str) -> Vec<Value> {
    let contract = user.json(&["contract", "show", "vm"]);
    let rows = contract["surfaces"].as_array().unwrap().iter();
    let native =
        rows.filter(|row| row["dialect"] == "cordial" && row["name"] != "contract-device" && row[what] == true);
    native.map(|row| row["name"].clone()).collect()
}

#[test]
fn user_space_of_a_stock_guest_has_the_dialect() {
    let user = User::default();
    let mut guest = user.guest(&[&DIALECTS[..], &["-c", "2"]].concat());
    guest.say("cd $(dirname $(grep -l 0x10fc /sys/bus/pci/devices/*/device))");
    guest.say("echo ids $(cat vendor device subsystem_vendor subsystem_device class revision)");
    assert_eq!(guest.wait_for("ids"), "ids 0x1af4 0x10fc 0x1af4 0x10fc 0x088000 0x01");
    guest.say("echo sizes $(stat -c %s resource0 resource2); echo drivers $(ls -d driver 2> /dev/null | wc -l)");
    assert_eq!((guest.wait_for("sizes"), guest.wait_for("drivers")), ("sizes 4096 131072".into(), "drivers 0".into()));
    guest.say("echo complaints $(dmesg -r | grep '^<[0-4]>' | grep -i -e pci -e ${PWD##*/})");
    assert_eq!(guest.wait_for("complaints"), "complaints");

    let before = inside(&mut guest, "cordial-guest show");
    assert_eq!((&before["version"], &before["vcpus"], &before["epoch"]), (&json!("1.0"), &json!(2), &json!(1)));
    assert_eq!((&before["accepted"], before["offered"].as_array()), (&json!([]), Some(&shown(&user, "offered"))));
    assert_eq!(before["generation"], "0".repeat(32));
    let time = inside(&mut guest, "cordial-guest time");
    let host = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let (ns, quantum) = (time["ns"].as_u64().unwrap(), time["quantum_ns"].as_u64().unwrap());
    assert!(ns <= host && host - ns < 3_600_000_000_000 && ns % quantum == 0, "{time} at {host}");
    let ledger = inside(&mut guest, "cordial-guest ledger");
    assert!(ledger["vcpus"].as_array().is_some_and(|vcpus| vcpus.len() == 2), "{ledger}");
    assert!(ledger["vcpus"][0]["mmio-write"].as_u64() > Some(0), "{ledger}");
    let after = inside(&mut guest, "cordial-guest show");
    assert_eq!(after["accepted"], json!(["time-of-day", "ledger"]));
    assert_eq!(after["accepted"].as_array(), Some(&shown(&user, "accepted")));
    let device = user.surface("vm", "contract-device");
    assert!(device["used"].as_u64() >= Some(4) && device["refused"] == 0, "{device}");
    // What is the kernel's, user space cannot have.
    assert_eq!(status(&mut guest, "cordial-guest watch wait"), "status 1");
    assert_eq!(user.surface("vm", "contract-device")["refused"], 1);
    assert_eq!(status(&mut guest, "cordial-guest"), "status 2");
    assert_eq!(guest.end(), 0);
}

#[test]
fn loads_from_the_pages_cost_no_exits_and_stores_change_nothing() {
    let user = User::default();
    let mut guest = user.guest(&DIALECTS);
    let cost = inside(&mut guest, "cordial-guest cost");
    let exits = |what: &str| cost[what]["exits"].as_u64().unwrap();
    assert_eq!((&cost["look"]["times"], &cost["call"]["times"]), (&json!(100_000), &json!(1_000)));
    // Of the whole machine: its kernel may have loaded from a device meanwhile.
    assert!(exits("look") < 100 && (1_000..1_100).contains(&exits("call")), "{cost}");

    guest.say("cd $(dirname $(grep -l 0x10fc /sys/bus/pci/devices/*/device))");
    guest.say("base() { sed -n \"$1p\" resource | cut -d' ' -f1; }; registers=$(base 1); pages=$(base 3)");
    let before = inside(&mut guest, "cordial-guest show");
    // busybox takes the width in bits for one in bytes where it looks whether an access spans pages, and would map what lies
    // behind the region, which is the kernel's: nothing in the last 64 bytes of a page.
    for (at, width) in [(0, 8), (4, 32), (8, 64), (0x18, 64), (0x1_0000, 16), (0x1_ffc0, 64)] {
        guest.say(&format!("devmem $((pages + {at})) {width} 0x5a"));
    }
    // Registers that are none, or have another width.
    for (at, width) in [(0, 32), (0x300, 32), (0x308, 16), (0x310, 64), (0xfc0, 64)] {
        guest.say(&format!("devmem $((registers + {at})) {width} 1"));
    }
    let after = inside(&mut guest, "cordial-guest show");
    let without = |mut shown: Value| {
        let ignored = shown["ignored_stores"].take();
        (ignored, shown)
    };
    assert_eq!((without(before.clone()).0, without(after.clone()).0), (json!(0), json!(6 + 5)));
    assert_eq!(without(before).1, without(after).1);
    guest.say("echo loads $(devmem $((registers + 2)) 16) $(devmem $((registers + 0x100)) 32) $(devmem $((registers + 0x160)) 64)");
    assert_eq!(guest.wait_for("loads"), "loads 0xFFFF 0xFFFFFFFF 0xFFFFFFFFFFFFFFFF", "the last one is PERMISSION");
    assert_eq!(guest.end(), 0);
}

#[test]
fn a_revocation_reaches_user_space_which_gives_the_feature_up() {
    let user = User::default();
    let mut guest = user.guest(&DIALECTS);
    guest.say("cordial-guest watch time-of-day generation; echo ended $?");
    guest.wait_for("watching time-of-day generation");
    assert_eq!(user.surface("vm", "time-of-day")["accepted"], true);
    let revoked = user.json(&["contract", "revoke", "vm", "time-of-day", "--wait", "120"]);
    assert_eq!((&revoked["state"], &revoked["epoch"]), (&json!("acknowledged"), &json!(2)));
    guest.wait_for("revoking time-of-day (epoch 2)");
    guest.wait_for("gone time-of-day");
    let row = user.surface("vm", "time-of-day");
    assert_eq!((&row["offered"], &row["accepted"], &row["revoking"]), (&json!(false), &json!(false), &json!(false)));
    assert_eq!(user.verb(&["contract", "revoke", "vm", "generation", "--wait", "120"]).status, 0);
    guest.wait_for("gone generation");
    assert_eq!(guest.wait_for("ended"), "ended 0");
    assert_eq!(status(&mut guest, "cordial-guest time"), "status 1");

    // Nobody watches the ledger: it is overdue, visibly, and still honoured.
    inside(&mut guest, "cordial-guest ledger");
    user.refused(
        &["contract", "revoke", "vm", "ledger", "--wait", "3"],
        5,
        "has not acknowledged epoch 4 within 3 s (overdue)",
    );
    let row = user.surface("vm", "ledger");
    assert_eq!((&row["offered"], &row["accepted"], &row["revoking"]), (&json!(false), &json!(true), &json!(true)));
    let audit = user.json(&["contract", "audit", "vm"]);
    let overdue = json!("overdue");
    assert!(audit["findings"].as_array().unwrap().iter().any(|finding| finding["kind"] == overdue), "{audit}");
    assert_eq!(inside(&mut guest, "cordial-guest show")["overdue"], true);
    assert_eq!(user.json(&["contract", "revoke", "vm", "ledger"])["state"], "overdue");
    // It can still be given up.
    guest.say("timeout 5 cordial-guest watch");
    guest.wait_for("gone ledger");
    assert_eq!(user.surface("vm", "ledger")["accepted"], false);
    assert_eq!(guest.end(), 143, "timeout ended the last command");
}

#[test]
fn the_device_can_be_left_out() {
    let count = "grep -l 0x10fc /sys/bus/pci/devices/*/device | wc -l";
    // Without the dialect there is none, either: the_kernel_is_content_and_knows_the_machine.
    for words in [&["--dialect", "kvm,cordial", "--pv", "-contract-device"][..], &["--dialect", "none"]] {
        let done = Cordial::run(&[&["-q"], words, &["--", "sh", "-c", count]].concat()).done();
        assert_eq!((done.status, done.text().as_str()), (0, "0\n"), "{}", done.stderr);
    }
}
