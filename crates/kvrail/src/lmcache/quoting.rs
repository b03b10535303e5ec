//! Percent-encoding, as file names have it: every byte but letters, digits and `_.-~`.

/// Returns `text` for a file name.
pub(super) fn quote(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                quoted.push(char::from(byte));
            }
            _ => {
                quoted.push('%');
                for digit in [byte >> 4, byte & 15] {
                    let digit = char::from_digit(u32::from(digit), 16).unwrap_or('0');
                    quoted.push(digit.to_ascii_uppercase());
                }
            }
        }
    }
    quoted
}

/// Returns the text of a file name; `None` for a spelling that [`quote`] does not write.
pub(super) fn unquote(name: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let (digits, after) = rest.split_first_chunk::<2>()?;
        let digits = std::str::from_utf8(digits).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok()?);
        rest = after;
    }
    let text = String::from_utf8(bytes).ok()?;
    (quote(&text) == name).then_some(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_text_comes_back(text in "\\PC{0,40}") {
            let name = quote(&text);
            prop_assert!(!name.contains('/'));
            prop_assert_eq!(unquote(&name), Some(text));
        }

        #[test]
        fn a_name_has_one_spelling(name in "[a-f0-9%/@~]{0,12}") {
            if let Some(text) = unquote(&name) {
                prop_assert_eq!(quote(&text), name);
            }
        }
    }

    #[test]
    fn other_spellings_are_none() {
        assert_eq!(quote("a/b@1%é~"), "a%2Fb%401%25%C3%A9~");
        for name in ["a/b", "%2f", "%41", "%", "%4", "%+1", "%FF"] {
            assert_eq!(unquote(name), None, "{name}");
        }
    }
}
