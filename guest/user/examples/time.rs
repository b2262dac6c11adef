//! The host's time of day, in a guest of Cordial with a contract device; to be run by root.

use contract::native::feature;

fn main() -> Result<(), cordial_guest::Error> {
    let device = cordial_guest::Device::find()?;
    device.accept(feature::TIME_OF_DAY)?;
    println!("{:?} since 1970-01-01 UTC", device.time_of_day()?);
    Ok(())
}
