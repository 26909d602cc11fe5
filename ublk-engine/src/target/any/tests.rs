use super::*;
use crate::plan::BackingIndex;
use crate::request::RequestKind;
use crate::target::{Rule, TransferLimit};

/// Rules of the layers of a stack, outermost first. All layers have the same seed.
const RULES: [&[&str]; 3] = [
    &["p=0.2,short", "p=0.3,delay=1ms", "op=write,p=0.1,error=EIO"],
    &["count=40,p=0.5,delay=2us", "p=0.1,error=ENOSPC"],
    &["op=read,p=0.4,short", "p=0.05,delay=3ms,error=EILSEQ"],
];

/// Digests of all results of each target with 0 to 3 layers, for queue 0 and for queue 3. They were
/// recorded when a fault target contained another target. A seed must give the same faults in every
/// version.
const RECORDED: [[[u64; 2]; 4]; 4] = [
    [
        [0x30dd_ddcf_36a8_3277, 0x30dd_ddcf_36a8_3277],
        [0x8e7d_ea25_595d_0086, 0x688d_bf60_42fa_5a38],
        [0x0441_4d11_6b05_4e28, 0xd539_b015_ef94_ed64],
        [0x54e4_7056_eb3c_2d1e, 0x0eb3_e571_4f61_b91e],
    ],
    [
        [0x9e28_7cb1_9812_bcf1, 0x9e28_7cb1_9812_bcf1],
        [0x5771_0118_9b9b_a609, 0x5668_5009_21d8_f0f7],
        [0x2b25_c26a_0f44_723f, 0x9ca3_e0c6_a8ed_c08c],
        [0x7085_f840_2241_3f4b, 0x2fdd_35cd_6bf0_1239],
    ],
    [
        [0x6bda_128f_ca4a_d626, 0x6bda_128f_ca4a_d626],
        [0x6869_25af_e556_7669, 0x4bd1_b263_d68b_027b],
        [0xee0a_9090_7c7d_1b12, 0x4db1_76c9_1f22_1062],
        [0xc066_e2e9_a001_a636, 0x27bc_3a0a_a091_1f8b],
    ],
    [
        [0xb2d6_a60c_3e7e_77ac, 0xb2d6_a60c_3e7e_77ac],
        [0x01c3_62e4_3ef4_f975, 0xd9df_faed_ab83_82f5],
        [0x9218_673c_4c8f_02dc, 0x15ec_56d7_5a20_ca27],
        [0x4665_47ca_a4fb_4805, 0xc02f_f4ab_cf74_4b92],
    ],
];

fn bases() -> [BaseTarget; 4] {
    let limit = TransferLimit::new(512, 4096, 16384, 512);
    let extents = (0..64).map(|n| (BackingIndex(n % 3), u64::from(n / 3) << 15, 1 << 15));
    [
        BaseTarget::Null(NullTarget),
        BaseTarget::Loop(LoopTarget::new(2 << 20).within(limit)),
        BaseTarget::Linear(LinearTarget::new(extents).unwrap()),
        BaseTarget::Stripe(StripeTarget::new(4096, &[1 << 20; 3]).unwrap()),
    ]
}

fn layers(count: usize) -> Vec<AnyLayer> {
    let layer = |rules: &&[&str]| {
        let rules: Vec<Rule> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        AnyLayer::Fault(FaultLayer::new(rules, 7, 512))
    };
    RULES[..count].iter().map(layer).collect()
}

/// Some are beyond the end of a device, and many need several windows.
fn requests() -> impl Iterator<Item = Request> {
    let mut state = 1_u64;
    let mut draw = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % below
    };
    (0..300).map(move |_| {
        let (offset, len) = (draw(3600) * 512, (1 + draw(512)) * 512);
        match draw(8) {
            0 => Request { kind: RequestKind::Flush, offset: 0, len: 0 },
            1 => Request { kind: RequestKind::Discard, offset, len },
            2 | 3 => Request { kind: RequestKind::Write { fua: true }, offset, len },
            _ => Request { kind: RequestKind::Read, offset, len },
        }
    })
}

/// FNV-1a.
fn digest(target: &AnyTarget) -> u64 {
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    let mut note = |text: String| {
        for byte in text.bytes() {
            digest = (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for request in requests() {
        // The digests have the former name of the type.
        note(format!("{:?}", target.single(&request)).replace("BackingPosition", "Place"));
        let (mut plan, mut from) = (Plan::default(), Some(0));
        while let Some(cursor) = from {
            plan.clear();
            let result = target.plan(&request, cursor, &mut plan);
            from = plan.next().filter(|_| result.is_ok());
            let said = (plan.delay_ns(), plan.at_first(), plan.waits_at(), plan.next());
            note(format!("{result:?} {said:?}"));
            if result.is_ok() {
                (0..plan.len()).for_each(|n| note(format!("{:?}", plan.op(n))));
            }
        }
    }
    digest
}

#[test]
fn layers_of_faults_decide_as_nested_fault_targets_did() {
    for (base, recorded) in bases().iter().zip(RECORDED) {
        for (count, recorded) in recorded.into_iter().enumerate() {
            let target = AnyTarget::new(layers(count), base.clone());
            let digests = [0, 3].map(|qid| digest(&target.for_queue(Qid(qid))));
            assert_eq!(digests, recorded, "{count} layers on {base:?}");
        }
    }
}

#[test]
fn the_target_below_the_layers_is_replaced() {
    for count in 0..4 {
        let mut target = AnyTarget::new(layers(count), BaseTarget::Loop(LoopTarget::new(4096)));
        let grown = BaseTarget::Loop(LoopTarget::new(8192));
        assert!(grown.extends(target.base()) && !target.base().extends(&grown));
        target.replace_base(&grown);
        assert_eq!(target.layers().len(), count);
        let BaseTarget::Loop(base) = target.base() else { panic!("{target:?}") };
        assert_eq!(base.size(), 8192);
        for (number, base) in bases().iter().enumerate() {
            assert_eq!(base.extends(target.base()), number == 1, "{base:?}");
        }
    }
}

/// The tag of the target's kind also tells whether there are layers: there is no second tag to
/// check.
#[test]
fn layers_cost_a_target_without_them_nothing() {
    assert_eq!(size_of::<AnyTarget>(), size_of::<BaseTarget>());
}

/// A layer that stays goes on in its random stream, and with the rest of its counts.
#[test]
fn a_layer_that_stays_goes_on_as_it_was() {
    let base = BaseTarget::Loop(LoopTarget::new(2 << 20));
    let old = AnyTarget::new(layers(2), base.clone()).for_queue(Qid(3));
    let decide = |layer: &AnyLayer, at| match layer {
        AnyLayer::Fault(fault) => {
            requests().skip(at).map(|it| fault.decide(&it)).collect::<Vec<_>>()
        }
        AnyLayer::Throttle(_) => unreachable!("there is none"),
    };
    let fresh = AnyTarget::new(layers(3), base).for_queue(Qid(3));
    // A new layer outside, and the old ones in another order.
    let new = AnyTarget::new([2, 1, 0].map(|n| fresh.layers()[n].clone()), fresh.base().clone());
    old.layers().iter().for_each(|layer| drop(decide(layer, 200)));
    new.continue_from(&old, &[None, Some(1), Some(0)]);
    assert_eq!(decide(&new.layers()[0], 0), decide(&fresh.layers()[2], 0), "a new one begins anew");
    let others: Vec<_> = fresh.layers()[..2].iter().map(|layer| decide(layer, 0)).collect();
    for (n, other) in [(1, 1), (0, 2)] {
        let went_on = decide(&new.layers()[other], 0);
        assert_ne!(went_on, others[n], "layer {n} does not begin anew");
        assert_eq!(went_on, decide(&old.layers()[n], 0), "layer {n}");
    }
}
