//! Sizes and durations as people write them, in and out.

use std::time::Duration;

/// Bytes from `4096`, `64k`, `256M`, `1GiB`: powers of 1024 in any case, `B` or `iB` behind.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let unit = unit.trim().to_ascii_lowercase();
    let shift = match unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit) {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(format!("\"{text}\" is no size: write 64M, 2GiB or a number of bytes")),
    };
    let number: u64 = number.parse().map_err(|_| format!("\"{text}\" does not begin with a whole number"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text} is more than 64 bits of bytes"))
}

/// A duration from `500ms`, `10s`, `10m`, `1h`; a bare number is seconds. Not 0.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let number: u64 = number.parse().map_err(|_| format!("\"{text}\" does not begin with a whole number"))?;
    let seconds = |each: u64| number.checked_mul(each).map(Duration::from_secs);
    let duration = match unit.trim() {
        "ms" => Some(Duration::from_millis(number)),
        "" | "s" => seconds(1),
        "m" | "min" => seconds(60),
        "h" => seconds(3600),
        _ => return Err(format!("\"{text}\" is no duration: write 500ms, 10s, 10m or 1h")),
    };
    match duration {
        Some(duration) if !duration.is_zero() => Ok(duration),
        Some(_) => Err(format!("\"{text}\" is no time at all")),
        None => Err(format!("{text} is longer than can be counted")),
    }
}

fn split(text: &str) -> (&str, &str) {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text.split_at(digits)
}

/// Bytes for people: `256 MiB`, `1.5 GiB`.
pub(crate) fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let step = (bytes.max(1).ilog2() / 10).min(4);
    let whole = 1_u64 << (10 * step);
    let unit = UNITS[step as usize];
    if bytes.is_multiple_of(whole) {
        format!("{} {unit}", bytes / whole)
    } else {
        format!("{:.1} {unit}", bytes as f64 / whole as f64)
    }
}

/// A count for people, in groups of three digits.
pub(crate) fn show_count(count: u64) -> String {
    let digits = count.to_string();
    let mut shown = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            shown.push(',');
        }
        shown.push(digit);
    }
    shown
}

/// So many of something, in the plural but for one: `1 vCPU`, `2 vCPUs`.
pub(crate) fn show_number(count: u64, of: &str) -> String {
    format!("{} {of}{}", show_count(count), if count == 1 { "" } else { "s" })
}

/// A duration for people: three digits and a unit.
pub(crate) fn show_duration(duration: Duration) -> String {
    let ns = duration.as_nanos() as f64;
    let (value, unit) = match ns {
        ns if ns < 1e3 => (ns, "ns"),
        ns if ns < 1e6 => (ns / 1e3, "µs"),
        ns if ns < 1e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    match value {
        value if value >= 100.0 || unit == "ns" => format!("{value:.0} {unit}"),
        value if value >= 10.0 => format!("{value:.1} {unit}"),
        value => format!("{value:.2} {unit}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("64k"), Ok(65536));
        assert_eq!(bytes("256M"), Ok(256 << 20));
        assert_eq!(bytes("2 GiB"), Ok(2 << 30));
        assert_eq!(bytes("1gb"), Ok(1 << 30));
        for bad in ["", "M", "12x", "-1", "1.5G", "99999999999T"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_are_not_nothing() {
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("10"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("10m"), Ok(Duration::from_secs(600)));
        for bad in ["", "0", "0ms", "s", "5 days", "1.5s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn values_are_shown_short() {
        assert_eq!(show_bytes(256 << 20), "256 MiB");
        assert_eq!(show_bytes(3 << 29), "1.5 GiB");
        assert_eq!(show_bytes(0), "0 B");
        assert_eq!(show_count(1_234_567), "1,234,567");
        assert_eq!(show_count(12), "12");
        assert_eq!((show_number(1, "run"), show_number(2000, "run")), ("1 run".into(), "2,000 runs".into()));
        assert_eq!(show_duration(Duration::from_nanos(850)), "850 ns");
        assert_eq!(show_duration(Duration::from_nanos(1_234)), "1.23 µs");
        assert_eq!(show_duration(Duration::from_millis(1_350)), "1.35 s");
    }
}
