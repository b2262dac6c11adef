//! `cordial image`: what is in the cache.

use crate::cache::{Cache, Entry};
use crate::cli::ImageVerb;
use crate::copies::Copy;
use crate::failure::Failure;
use crate::kernel::{self, Search};
use crate::run::prepare::{Needs, generated};
use crate::values::human;
use serde_json::json;

/// Does what `verb` says; returns what goes to standard output.
///
/// # Errors
/// The cache's and apt's.
pub fn image(verb: &ImageVerb) -> Result<String, Failure> {
    let cache = Cache::of_user()?;
    match verb {
        ImageVerb::Ls { json } => Ok(if *json { list_json(&cache) } else { list(&cache) }),
        ImageVerb::Pull { request } => {
            if request != kernel::DEBIAN && !request.starts_with("debian=") {
                let message = format!("\"{request}\" cannot be fetched: debian, debian=generic or debian=VERSION can");
                return Err(Failure::usage(message));
            }
            Ok(line(&kernel::pull(&cache, request)?))
        }
        ImageVerb::Gc { all } => {
            let removed = cache.clean(*all)?;
            let bytes = removed.iter().map(Entry::size).sum();
            Ok(format!("removed {} of {}\n", removed.len(), human(bytes)))
        }
        ImageVerb::Initramfs { output, kernel, copy, no_disks, yes } => {
            let asked = kernel.clone().map(|kernel| (kernel, "command line".to_owned()));
            let kernel = Search { asked, modules: None, cache: &cache, yes: *yes }.find()?;
            let copies = Copy::parse_all(copy, "command line")?;
            let bytes = generated(&kernel, &cache, Needs { disks: !no_disks, guest_tool: false }, &copies)?;
            std::fs::write(output, bytes)
                .map_err(|error| Failure::io(format!("write {}", output.display()), &error))?;
            Ok(format!("{}\n", kernel.image.display()))
        }
    }
}

fn line(entry: &Entry) -> String {
    let manifest = &entry.manifest;
    let (size, digest) = (human(entry.size()), &manifest.sha256[..manifest.sha256.len().min(12)]);
    format!("{:<20} {:<40} {:<18} {:>10}  {digest}\n", manifest.request, manifest.package, manifest.version, size)
}

fn list(cache: &Cache) -> String {
    let header = format!("{:<20} {:<40} {:<18} {:>10}  SHA-256\n", "REQUEST", "PACKAGE", "VERSION", "SIZE");
    std::iter::once(header).chain(cache.entries().iter().map(line)).collect()
}

fn list_json(cache: &Cache) -> String {
    let images: Vec<_> = cache
        .entries()
        .iter()
        .map(|entry| json!({ "directory": entry.directory, "bytes": entry.size(), "manifest": entry.manifest }))
        .collect();
    format!("{}\n", json!({ "schema": "cordial.images/1", "cache": cache.root(), "images": images }))
}
