//! Text that cannot become markup.

/// Returns text for between tags or in quoted attributes.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Not allowed in a page; names of files may have them.
            letter if letter.is_control() && letter != '\n' => out.push('\u{fffd}'),
            letter => out.push(letter),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_letter_can_end_a_text_or_an_attribute() {
        let found = escaped("<a href=\"x\" title='y'>&\u{7}\n");
        let expected = "&lt;a href=&quot;x&quot; title=&#39;y&#39;&gt;&amp;\u{fffd}\n";
        assert_eq!(found, expected);
    }
}
