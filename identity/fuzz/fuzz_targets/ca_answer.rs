//! What a CA answers: elements of PEM. The key is nobody's, so nothing is good.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ringfence_identity::testing::read_ca_answer;

fuzz_target!(|text: &str| {
    let elements: Vec<String> = text.split('\0').map(str::to_owned).collect();
    if let Err(problem) = read_ca_answer(&elements) {
        let text = problem.to_string();
        assert!(!text.is_empty() && !text.contains(char::is_control), "{text:?}");
    } else {
        panic!("an SVID for a key that no certificate is for");
    }
});
