//! Numbers as a reader wants them.

/// A part of one as a percentage.
pub fn percent(part: f64) -> String {
    format!("{:.0}%", part * 100.0)
}

/// A number without decimals, in groups of three digits.
pub fn group(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A number with one decimal.
pub fn decimal(number: f64) -> String {
    let text = format!("{number:.1}");
    let (whole, tenth) = text.split_once('.').unwrap_or((&text, "0"));
    whole.parse().map_or_else(|_| text.clone(), |whole| format!("{}.{tenth}", group(whole)))
}

/// A count, in groups of three digits.
pub fn count(number: u64) -> String {
    // Exact up to 2^53, and nothing counted here comes near.
    #[allow(clippy::cast_precision_loss)]
    group(number as f64)
}

/// Bytes in a unit that suits them.
pub fn size(bytes: u64) -> String {
    let (unit, shift) = match bytes {
        0x4000_0000.. => ("GiB", 30),
        _ => ("MiB", 20),
    };
    let whole = bytes >> shift;
    let tenth = ((bytes - (whole << shift)) * 10) >> shift;
    if tenth == 0 {
        return format!("{} {unit}", count(whole));
    }
    format!("{}.{tenth} {unit}", count(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(count(number), text);
        }
        assert_eq!(group(21_999.6), "22,000");
        assert_eq!((decimal(2830.06), decimal(999.96)), ("2,830.1".into(), "1,000.0".into()));
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(size(2 << 30), "2 GiB");
        assert_eq!(size((31 << 20) + (1 << 19)), "31.5 MiB");
        assert_eq!(size(5 << 40), "5,120 GiB");
    }
}
