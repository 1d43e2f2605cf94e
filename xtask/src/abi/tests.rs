use super::*;

const V17: Release = Release(4, 17);
const V20: Release = Release(4, 20);

fn constant(item: &'static str, name: &'static str, value: i64) -> AbiConst {
    AbiConst {
        item,
        name,
        value,
        bits: 32,
    }
}

const FIELDS: &[AbiField] = &[
    AbiField {
        field: "a",
        name: "a",
        offset: 0,
        size: 4,
    },
    AbiField {
        field: "_pad",
        name: "_pad",
        offset: 4,
        size: 4,
    },
    AbiField {
        field: "kind",
        name: "type",
        offset: 8,
        size: 8,
    },
];

const S: AbiStruct = AbiStruct {
    item: "c::m::S",
    c_type: "struct s",
    size: 16,
    versions: (0, u32::MAX),
    fields: FIELDS,
};

fn tables(consts: &[AbiConst], structs: &[AbiStruct]) -> Tables {
    Tables {
        consts: consts.to_vec(),
        structs: structs.iter().map(|s| (false, *s)).collect(),
    }
}

/// Headers as a list of what expressions are.
fn run(release: Release, tables: &Tables, rules: &str, headers: &[(&str, u64)]) -> Report {
    let versions = [
        (DOMCTL, if release == V17 { 0x15 } else { 0x17 }),
        ("XEN_SYSCTL_INTERFACE_VERSION", 0x15),
        ("XENPF_INTERFACE_VERSION", 1),
    ];
    let known: BTreeMap<&str, u64> = headers.iter().copied().chain(versions).collect();
    let mut spellings: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for name in known.keys() {
        let names = spellings.entry(name.to_ascii_uppercase()).or_default();
        names.insert((*name).to_owned());
    }
    let rules = Rules::parse(rules).unwrap();
    let evaluate = |_: bool, asked: &[String]| {
        let answer = |e: &String| known.get(e.as_str()).copied().ok_or("undeclared".into());
        Ok(asked.iter().map(answer).collect())
    };
    compare(release, tables, &rules, &spellings, evaluate).unwrap()
}

const STRUCT: &[(&str, u64)] = &[
    ("sizeof(struct s)", 16),
    ("offsetof(struct s, a)", 0),
    ("sizeof(((struct s *)0)->a)", 4),
    ("offsetof(struct s, type)", 8),
    ("sizeof(((struct s *)0)->type)", 8),
];

#[test]
fn equal_things_are_counted_and_padding_is_exempt() {
    let t = tables(&[constant("c::m::OP_DO_IT", "OP_DO_IT", 7)], &[S]);
    let headers = [STRUCT, &[("OP_do_it", 7)]].concat();
    let report = run(V17, &t, "", &headers);
    assert_eq!(report.errors, [""; 0]);
    assert_eq!(report.differences, [""; 0]);
    assert_eq!((report.compared, report.padding, report.exempt), (6, 1, 0));
}

#[test]
fn a_difference_is_named_with_both_values() {
    let t = tables(&[constant("c::m::A", "A", 7)], &[S]);
    let mut headers = [STRUCT, &[("A", 9)]].concat();
    headers[0].1 = 24;
    let report = run(V17, &t, "", &headers);
    let want = [
        "m::A is 0x7 (7), A is 0x9 (9)",
        "size of m::S is 0x10 (16), sizeof(struct s) is 0x18 (24)",
    ];
    assert_eq!(report.differences, want);
}

#[test]
fn of_two_spellings_each_is_compared() {
    let t = tables(&[constant("c::m::OP_X", "OP_X", 1)], &[]);
    let report = run(V17, &t, "", &[("OP_X", 1), ("__op_x", 2)]);
    assert_eq!((report.compared, report.differences.len()), (2, 1));
}

#[test]
fn negative_numbers_are_those_of_a_c_int() {
    let t = tables(&[constant("c::m::A", "A", -1)], &[]);
    assert_eq!(run(V17, &t, "", &[("A", u64::MAX)]).differences, [""; 0]);
    assert_eq!(run(V17, &t, "", &[("A", 0xffff_ffff)]).differences, [""; 0]);
    assert_eq!(run(V17, &t, "", &[("A", 0xffff)]).differences.len(), 1);
}

#[test]
fn what_the_headers_lack_is_an_error_unless_a_rule_says_so() {
    let t = tables(&[constant("c::m::NEW", "NEW", 1)], &[]);
    assert_eq!(run(V17, &t, "", &[]).errors.len(), 1);

    let rule = "since 4.18 m::NEW";
    let report = run(V17, &t, rule, &[]);
    assert_eq!(report.errors, [""; 0]);
    assert_eq!(report.absent, ["m::NEW (since 4.18)"]);
    let report = run(V20, &t, rule, &[("NEW", 1)]);
    assert_eq!((report.compared, report.absent.len()), (1, 0));
    assert_eq!(run(V20, &t, rule, &[]).errors.len(), 1);
}

#[test]
fn a_rule_that_the_headers_belie_is_an_error() {
    let t = tables(&[constant("c::m::NEW", "NEW", 1)], &[]);
    let report = run(V17, &t, "since 4.18 m::NEW", &[("NEW", 1)]);
    assert_eq!(report.errors.len(), 1, "{report:?}");

    // A structure of later headers only, whose C type is in these.
    let late = AbiStruct {
        versions: (0x17, 0x17),
        ..S
    };
    let report = run(V17, &tables(&[], &[late]), "", STRUCT);
    assert_eq!(report.errors.len(), 1, "{report:?}");
    // With another layout for these it is as it should be.
    let early = AbiStruct {
        item: "c::m::Early",
        versions: (0x15, 0x16),
        ..S
    };
    let report = run(V17, &tables(&[], &[late, early]), "", STRUCT);
    assert_eq!(report.errors, [""; 0]);
    assert_eq!(report.absent, ["m::S (domctl 0x17 to 0x17)"]);
}

#[test]
fn what_has_no_name_in_c_needs_a_rule() {
    let nameless = AbiStruct { c_type: "", ..S };
    let t = tables(&[constant("c::m::A", "", 1)], &[nameless]);
    // The constant, the structure, and its fields but the padding.
    assert_eq!(run(V17, &t, "", &[]).errors.len(), 4);
    let rules = "c m::A = other\nc m::S = offsetof(struct s, u)\nexempt m::S.*: of another\n";
    let headers = [("other", 1), ("offsetof(struct s, u)", 12)];
    let report = run(V17, &t, rules, &headers);
    assert_eq!(report.errors, [""; 0]);
    assert_eq!(
        (report.compared, report.differences.len(), report.exempt),
        (2, 1, 2)
    );
}

#[test]
fn an_item_in_no_table_is_found() {
    let rules = Rules::parse("exempt m::FREE: nothing in C\n").unwrap();
    let t = tables(&[constant("c::m::A", "A", 1)], &[S]);
    let item = |path: &str, tabled| Item {
        path: path.into(),
        tabled,
    };
    let mut items = vec![
        item("m::A", true),
        item("m::S", true),
        item("m::S.a", true),
        item("m::S._pad", true),
        item("m::S.kind", true),
        item("m::FREE", false),
    ];
    assert_eq!(escaped(&items, &t, &rules), [""; 0]);
    items.push(item("m::ALONE", false));
    items.push(item("unlisted::B", true));
    let found = escaped(&items, &t, &rules);
    assert!(
        found[0].starts_with("m::ALONE: no table has it"),
        "{found:?}"
    );
    assert!(found[1].starts_with("unlisted::B: the table"), "{found:?}");
    items.retain(|i| i.path != "m::A");
    assert_eq!(escaped(&items, &t, &rules).len(), 3);
}

#[test]
fn nothing_of_the_crate_escapes() {
    let source = paths::root().join("dom0-proto");
    let rules = fs::read_to_string(source.join("abi-check.txt")).unwrap();
    let rules = Rules::parse(&rules).unwrap();
    let items = items::of_crate(&source.join("src")).unwrap();
    assert!(items.len() > 2000, "{}", items.len());
    assert_eq!(escaped(&items, &Tables::of_crate(), &rules), [""; 0]);
}
