use proptest::prelude::*;

use super::*;

fn arbitrary_head() -> impl Strategy<Value = ChunkHead> {
    (
        ("[0-9a-f]{16}", any::<u32>(), any::<u32>(), 1_usize..100_000),
        proptest::collection::vec(any::<u8>(), 8..=32),
        proptest::option::of(proptest::collection::vec(any::<u8>(), 8..=32)),
        (1_usize..100, 1_usize..200, 1_usize..1_000_000),
        any::<u64>(),
    )
        .prop_map(
            |((namespace, group, rank, tokens), key, parent, shape, root)| ChunkHead {
                fields: HeadFields {
                    namespace,
                    group,
                    rank: rank.into(),
                    tokens,
                    chunk: ChunkRef {
                        key: ChunkKey::from_bytes(&key).unwrap(),
                        parent: parent.map(|hash| ChunkKey::from_bytes(&hash).unwrap()),
                    },
                },
                format: ChunkFormat::new([shape.0, shape.1, shape.2]).unwrap(),
                root,
            },
        )
}

fn encoded(head: &ChunkHead) -> Vec<u8> {
    let mut page = vec![0; PAGE_BYTES];
    head.encode_into(&mut page).unwrap();
    page
}

proptest! {
    #[test]
    fn a_head_round_trips(head in arbitrary_head()) {
        let page = encoded(&head);
        prop_assert_eq!(&page[..8], &4088_u64.to_le_bytes());
        prop_assert_eq!(ChunkHead::decode(&page).unwrap(), head.clone());
        prop_assert_eq!(ChunkHead::check(&page, &head.fields, &head.format).unwrap(), head.root);
    }

    #[test]
    fn random_bytes_never_panic(page in proptest::collection::vec(any::<u8>(), 0..5000)) {
        prop_assert!(ChunkHead::decode(&page).is_err());
    }

    #[test]
    fn any_flipped_bit_is_noticed(head in arbitrary_head(), bit in 0..PAGE_BYTES * 8) {
        let mut page = encoded(&head);
        page[bit / 8] ^= 1 << (bit % 8);
        // A flipped bit inside the root's digits may give another valid head: then the root
        // differs, and the page table cannot match it.
        match ChunkHead::check(&page, &head.fields, &head.format) {
            Ok(root) => prop_assert_ne!(root, head.root),
            Err(error) => prop_assert_eq!(error.kind(), ErrorKind::Damaged),
        }
    }

    #[test]
    fn mutated_json_never_panics(head in arbitrary_head(), at in 8_usize..600, byte in any::<u8>()) {
        let mut page = encoded(&head);
        page[at] = byte;
        let decoded = ChunkHead::decode(&page);
        // The short way of a check finds good what the long way does, and nothing else.
        let checked = ChunkHead::check(&page, &head.fields, &head.format);
        let expected = decoded.ok().filter(|found| {
            (&found.fields, &found.format) == (&head.fields, &head.format)
        });
        prop_assert_eq!(checked.ok(), expected.map(|found| found.root));
    }
}

#[test]
fn another_chunk_s_head_is_named() {
    let chunk = |byte: u8| ChunkRef {
        key: ChunkKey::from_bytes(&[byte; 32]).unwrap(),
        parent: None,
    };
    let fields = |byte| HeadFields {
        namespace: "0123456789abcdef".into(),
        group: 0,
        rank: 0.into(),
        tokens: 256,
        chunk: chunk(byte),
    };
    let format = ChunkFormat::new([2, 4, 4096]).unwrap();
    let page = encoded(&ChunkHead {
        fields: fields(1),
        format,
        root: 5,
    });
    let error = ChunkHead::check(&page, &fields(2), &format).unwrap_err();
    assert!(error.to_string().contains(&"01".repeat(32)), "{error}");
    let other = ChunkFormat::new([4, 2, 4096]).unwrap();
    let error = ChunkHead::check(&page, &fields(1), &other).unwrap_err();
    assert!(error.to_string().contains("shape"), "{error}");
}
