//! When to ask for an SVID, and when to ask again. Pure functions of their
//! arguments and a random number.

use std::time::Duration;

use rand::Rng;

/// How long after an issuance to refresh an SVID that has `remaining` to live:
/// half of it, give or take a tenth, so that SVIDs issued together are not
/// refreshed together.
pub(super) fn refresh_after(remaining: Duration, random: &mut impl Rng) -> Duration {
    remaining
        .mul_f64(random.random_range(0.4..0.6))
        .max(SHORTEST_REFRESH)
}

/// How long to wait after the `failures`th failure in a row (from 1).
///
/// The first two waits are short: a CA learns of a new pod a moment after we
/// do. Then 1 s, doubling to 150 s; each wait is cut by up to a quarter.
pub(super) fn retry_after(failures: u32, random: &mut impl Rng) -> Duration {
    let wait = match failures {
        0 | 1 => Duration::from_millis(250),
        2 => Duration::from_millis(500),
        more => 2u32
            .checked_pow(more.saturating_sub(3))
            .map_or(LONGEST_RETRY, |seconds| Duration::from_secs(seconds.into()))
            .min(LONGEST_RETRY),
    };
    wait.mul_f64(random.random_range(0.75..=1.0))
}

/// An SVID with seconds to live must not make a busy loop.
const SHORTEST_REFRESH: Duration = Duration::from_millis(250);
const LONGEST_RETRY: Duration = Duration::from_secs(150);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refresh_is_near_half_life_and_never_immediate() {
        let mut random = rand::rng();
        for _ in 0..1000 {
            let after = refresh_after(Duration::from_secs(100), &mut random);
            assert!((40..60).contains(&after.as_secs()), "{after:?}");
        }
        assert_eq!(refresh_after(Duration::ZERO, &mut random), SHORTEST_REFRESH);
    }

    #[test]
    fn retries_start_fast_double_and_stop_at_150_s() {
        let mut random = rand::rng();
        let expected = [
            250, 500, 1000, 2000, 4000, 8000, 16000, 32000, 64000, 128_000, 150_000,
        ];
        for (failures, longest) in (1u32..).zip(expected) {
            for _ in 0..100 {
                let wait = retry_after(failures, &mut random).as_millis();
                assert!(
                    wait <= longest && wait >= longest * 3 / 4,
                    "{failures}: {wait} ms"
                );
            }
        }
        assert!(retry_after(u32::MAX, &mut random) <= LONGEST_RETRY);
    }
}
